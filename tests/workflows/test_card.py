"""The card: what it says, what it keeps of the one before, and that no text of a file becomes markup or a key."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from loratools.cli import cli
from loratools.errors import FormatError
from loratools.formats import save
from loratools.ops.inspect import inspect
from loratools.workflows import _loading, _markdown, _provenance
from loratools.workflows._checking import Finding, findings
from loratools.workflows.card import BEGIN, END, Facts, metadata, split, written
from loratools.workflows.targets import Source
from tests.workflows._adapters import MADE, folder

REPORT = {
    "format": "peft", "kinds": {"lora": 2}, "ranks": {"4": 2}, "parameters": 100, "bytes": 800, "warnings": [],
    "modules": [{"name": f"model.layers.0.self_attn.{name}_proj.weight", "scaling": 0.5} for name in "qk"],
}  # fmt: skip
EVIL = ["a`b", "a|b", "a\nb", "# a", "<!-- x", END, "</code>", "[a](b)", "*a* _b_", "a\\", "---", "\x1b[2J", "&amp;", "\ud800"]


def facts(**more: Any) -> Facts:
    return Facts(**{"repo": "ada/style", "bases": ["ada/base"], "relation": "adapter", "report": REPORT, "file": "x.safetensors"} | more)


def front(text: str) -> dict[str, Any]:
    """Front matter as huggingface_hub reads and checks it."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def finding(target: str, **more: Any) -> Finding:
    source = Source("p", "1", "f", "u")
    made = {"target": target, "rule": "r", "kind": "refuse", "tensor": "t", "reason": "It stops.", "found": None, "share": None}
    return Finding(**made | {"unmeasured": None, "fit": "none", "source": source} | more)  # type: ignore[arg-type]


# -- front matter


def test_a_new_card_says_what_it_is() -> None:
    text = written(facts(license={"license": "apache-2.0"}, base_parameters=900))
    assert front(text) == {
        "base_model": "ada/base", "base_model_relation": "adapter", "library_name": "peft", "license": "apache-2.0",
        "tags": ["lora", "loratools"],
    }  # fmt: skip
    assert "\n# style\n" in text and text.index(BEGIN) < text.index("## What it is") < text.index(END)
    for line in ("| rank | 4 |", "| scaling | 0.5 |", "| parameters | 100, 10 % of base and adapter |", "| licence | `apache-2.0`, as the"):
        assert line in text


def test_a_licence_is_never_guessed() -> None:
    assert front(written(facts()))["license"] == "other"
    assert "the base&#39;s" not in written(facts()) and "| licence | the base's card tells none |" in written(facts())
    link = {"license": "other", "license_name": "a: licence", "license_link": "https://x/y"}
    assert {key: value for key, value in front(written(facts(license=link))).items() if "license" in key} == link


def test_a_merge_has_its_relation_and_all_its_models() -> None:
    report = {"format": "checkpoint", "tensors": 3, "parameters": 9, "dtypes": {"F32": 3}, "components": None, "warnings": []}
    config = {"architectures": ["LlamaForCausalLM"]}
    text = written(facts(relation="merge", bases=["ada/base", "bob/style"], report=report, config=config))
    assert front(text)["base_model"] == ["ada/base", "bob/style"] and front(text)["base_model_relation"] == "merge"
    assert front(text)["library_name"] == "transformers" and 'LlamaForCausalLM.from_pretrained("ada/style")' in text
    assert 'from_pretrained("ada/style")' not in written(facts(relation="merge", report=report, config={"architectures": ["x; import os"]}))
    piped = written(facts(relation="merge", report=report | {"components": {"unet": {}}}))
    assert 'DiffusionPipeline.from_pretrained("ada/style")' in piped and front(piped)["library_name"] == "diffusers"


CARD = """---
# mine
language:
- en
license: mit
tags: [chat]
'base_model': /home/me/model
model-index:
- name: a
  results: []
---
# My adapter

Prose & <b>markup</b>.
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_card_keeps_its_prose_and_its_keys(newline: str) -> None:
    before = CARD.replace("\n", newline)
    kept = yaml.safe_load(CARD.split("---")[1])
    first = written(facts(license={"license": "apache-2.0"}), before, kept)
    assert front(first) == kept | {
        "tags": ["chat", "lora", "loratools"], "base_model": "ada/base", "base_model_relation": "adapter", "library_name": "peft",
    }  # fmt: skip
    assert f"# mine{newline}" in first and first.count("\n") == first.count(newline)
    prose = before.split("---" + newline)[-1]
    assert f"{newline}---{newline}{prose}{newline}{BEGIN}" in first
    changed = first.replace("# My adapter", "# Better") + f"{newline}And after.{newline}"
    again = written(facts(report=REPORT | {"parameters": 7}), changed, front(first))
    assert again == changed.replace("| 100 |", "| 7 |").replace("`apache-2.0`, as the base's card says", "the base's card tells none")
    assert again.count(BEGIN) == again.count(END) == 1


def test_a_base_in_the_card_is_kept_unless_it_is_a_path_or_was_named() -> None:
    for value, named, kept in (("bob/other", False, True), ("bob/other", True, False), ("./m", False, False), (3, False, False)):
        made = metadata(facts(named=named), {"base_model": value})
        assert made.get("base_model", value) == (value if kept else "ada/base")
    kept = {"base_model": ["bob/a", "bob/b"], "base_model_relation": "merge"}
    assert metadata(facts(), kept).keys() == {"library_name", "license", "tags"}
    assert "tags" not in metadata(facts(), {"tags": {"a": 1}}) and "tags" not in metadata(facts(), {"tags": ["lora", "loratools"]})


def test_cards_that_cannot_be_merged_are_errors() -> None:
    said = "README.md: front matter whose keys do not stand on lines of their own: found license; write each as key: value on a line"
    with pytest.raises(FormatError, match=said):
        written(facts(), "---\n{license: mit}\n---\nx", {"license": "mit"})
    with pytest.raises(FormatError, match="block begins and does not end: expected <!-- loratools: end -->; delete its beginning"):
        written(facts(), f"prose\n{BEGIN}\nmore")


PROSE = [
    "# Mine\n", "x", "x  \n\n\n", "a\r\nb\n", "\n\n a\tb \n", "a\u2028b\x85c\x0bd\n", "---\nnot: front\n---\n", "<!-- mine -->", f"{END}\n",
]  # fmt: skip


@pytest.mark.parametrize("prose", PROSE)
@pytest.mark.parametrize("head", ["", "---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---\r\n", "\ufeff---\nlicense: mit\n---\n"])
def test_prose_is_kept_byte_for_byte(head: str, prose: str) -> None:
    if not head and prose.startswith("---"):
        head = "\n\nBefore.\n"
    kept = {"license": "mit"} if "license" in head else {}
    first = written(facts(), head + prose, kept)
    body = split(first)[1]
    assert body.startswith(split(head.removeprefix("\ufeff") + prose)[1])
    after = "And after.\r\n\n  "
    again = written(facts(report=REPORT | {"parameters": 7}), first + after, front(first))
    start, end = again.index(BEGIN), again.rindex(END)
    assert again[:start] == first[: first.index(BEGIN)] and again[end:] == first[first.rindex(END) :] + after
    assert "| 7 |" in again[start:end]
    assert written(facts(report=REPORT | {"parameters": 7}), again, front(again)) == again


def test_of_several_blocks_one_is_written_and_nothing_else_lost() -> None:
    block = f"{BEGIN}\nold\n{END}"
    made = written(facts(), f"---\nlicense: mit\n---\none\n{block}\ntwo\n{block}\nthree\n", {"license": "mit"})
    assert made.count(BEGIN) == made.count(END) == 1 and "old" not in made
    assert "\none\n" in made and made.endswith("\ntwo\n\nthree\n")
    for text in (f"{BEGIN}\nmine\n{block}\n", f"{block}\nmine\n{BEGIN}\n"):  # what stands behind a lost end may be anybody's
        with pytest.raises(FormatError, match="block begins and does not end"):
            written(facts(), text)


def test_front_matter_keeps_signs_that_are_no_ends_of_lines() -> None:
    before = '---\nlicense: mit\ntitle: "a\u2028b\x85c"\n---\nx\n'
    made = written(facts(), before, {"license": "mit", "title": "a\u2028b\x85c"})
    assert 'title: "a\u2028b\x85c"\n' in made


def test_odd_beginnings() -> None:
    assert front(written(facts(), "\ufeff" + CARD, {"license": "mit"}))["license"] == "mit"
    for text in ("", "   \n", "---\n---\n", "no front matter\n---\nlicense: mit\n---\n"):
        made = written(facts(), text, {})
        assert front(made)["base_model"] == "ada/base" and made.count("license:") == 1 + text.count("license:")


# -- text from files


@given(st.one_of(st.sampled_from(EVIL), st.text(max_size=30)))
def test_no_text_becomes_a_key_a_marker_or_a_row(text: str) -> None:
    rows = [{"name": text, "scaling": 1.0}]
    receipt = {
        "loratools": text, "operation": "merge", "arguments": {"base": text, "adapters": [text], "out": text, "rename": [text]},
        "inputs": [{"role": text, "path": text, "bytes": 1, "blake3": text}], "expected": 1, "applied": 1,
        "tensors": [{"name": text, "rank": 1, "error": 0.5, "optimal_error": 0.5}], "left_out": [{"name": text, "relative_norm": 1.0}],
    }  # fmt: skip
    report = REPORT | {"modules": rows, "kinds": {text: 1}, "warnings": [text], "format": "kohya"}
    found = {"diffusers": [finding("diffusers", tensor=text, reason=text)], "comfyui": []}
    license = {"license": "other", "license_name": text, "license_link": text}
    made = written(facts(report=report, receipt=receipt, findings=found, license=license, file=text or "x"))
    _, prose = split(made)
    assert prose.count(BEGIN) == prose.count(END) == prose.count("<!--") - 1 == 1
    body = prose[prose.index(BEGIN) : prose.index(END)]
    tables = [line for line in body.splitlines() if line.startswith("| ") and "---" not in line]
    assert {line.count("|") for line in tables} <= {3, 5}
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "## What it is", "## Use it", "### ComfyUI", "## How it was made", "## Known limits",
    ]  # fmt: skip
    assert "\x1b" not in made
    data = front(made.encode("utf-8", "replace").decode())
    more = {"license_name", "license_link"} if text else set()
    assert set(data) == {"base_model", "base_model_relation", "library_name", "license", "tags"} | more
    if text and "\ud800" not in text and text.isprintable():
        assert data["license_name"] == text
    assert split(written(facts(), made, data))[1].count(BEGIN) == 1


@given(st.text())
def test_scalars_come_back(text: str) -> None:
    (line,) = _markdown.entry("k", text)
    assert yaml.safe_load(line)["k"] == text


def test_front_matter_keeps_all_lines_of_other_keys() -> None:
    lines = ["a: |", "  tags: no", "", "  b", "tags:", "  - x", "# for c", "c: 1", "my key: 2"]
    assert _markdown.merged(lines, {"tags": ["z"]}) == ["a: |", "  tags: no", "", "  b", "tags:", "- z", "# for c", "c: 1", "my key: 2"]
    assert _markdown.top_keys(lines) == ["a", "tags", "c", "my key"]


# -- how it is loaded


def told(tmp_path: Path, kind: str, format: str | None = None, **config: Any) -> tuple[str, Mapping[str, Any]]:
    place = tmp_path / ("a" if format in (None, "peft", "mlx") else "a.safetensors" if format != "gguf" else "a.gguf")
    if format is None:
        folder(place, **config)
    else:
        save(MADE[kind](), place, format=format)
    report = inspect(place)
    names = [row["name"] for row in report["modules"]]
    asked = _loading.runtimes(report["format"], _loading.is_text(names, config.get("task_type")))
    found = {name: findings(place, name) for name in asked}
    text = written(facts(report=report, file=place.name, findings=found, config=config))
    return text, found


def test_a_language_models_lora_is_loaded_by_four(tmp_path: Path) -> None:
    text, _ = told(tmp_path, "plain", task_type="CAUSAL_LM")
    for line in (
        'base = AutoModelForCausalLM.from_pretrained("ada/base")\nmodel = PeftModel.from_pretrained(base, "ada/style")',
        "vllm serve ada/base --enable-lora --max-lora-rank 8 --lora-modules style=ada/style",
        "python -m sglang.launch_server --model-path ada/base --lora-paths style=ada/style",
        "loratools convert ada/style -o style.gguf --format gguf --base ada/base\nllama-cli -m BASE.gguf --lora style.gguf",
    ):
        assert line in text
    assert "## Known limits" not in text and "diffusers" not in text


def test_a_classifier_is_loaded_by_peft_alone(tmp_path: Path) -> None:
    text, found = told(tmp_path, "plain", task_type="SEQ_CLS")
    assert "AutoModelForSequenceClassification" in text
    assert set(found) == set(_loading.OF_TEXT)  # its tensors are a decoder's, and vLLM takes them


def test_what_a_runtime_loses_is_a_limit_and_no_way_to_load(tmp_path: Path) -> None:
    text, found = told(tmp_path, "dora on all", "peft")
    assert found["vllm"] and "vllm serve" not in text and "- vLLM refuses it: " in text
    assert "### PEFT" in text and "`model.layers.0.self_attn.q_proj.weight`" in text


def test_gguf_and_mlx_have_their_own(tmp_path: Path) -> None:
    for format, line in (("mlx", "mlx_lm.generate --model ada/base --adapter-path style"),):
        assert line in told(tmp_path, "plain", format)[0]
    gguf = _loading.Loaded(repo="ada/style", base="ada/base", format="gguf", file="a b.gguf", findings={"llama.cpp": []})
    assert "hf download ada/style 'a b.gguf' --local-dir .\nllama-cli -m BASE.gguf --lora 'a b.gguf'" in "\n".join(_loading.told(gguf))


def test_a_diffusion_adapter_names_its_file() -> None:
    found: dict[str, list[Finding]] = {"diffusers": [], "comfyui": []}
    of = _loading.Loaded(repo="ada/style", base="ada/base", format="kohya", file='s"<!--.safetensors', findings=found)
    text = "\n".join(_loading.told(of))
    assert r'pipe.load_lora_weights("ada/style", weight_name="s\"\u003c!--.safetensors")' in text and "PEFT" not in text
    assert _loading.runtimes("kohya", False) == ("diffusers", "comfyui") and _loading.runtimes("scratch", False) == ()


def test_vllm_is_given_a_rank_that_it_knows() -> None:
    for rank, room in ((1, 8), (8, 8), (9, 16), (200, 256), (400, 512)):
        of = _loading.Loaded(repo="a/b", base="c", format="peft", file="", rank=rank, text=True, findings={"vllm": []})
        assert f"--max-lora-rank {room} " in "\n".join(_loading.told(of))


# -- how it was made


EXTRACTED = {"base": "/home/me/b/", "tuned": "/x/t", "out": "/y/out", "rank": 8, "exact": True, "include": ["*q*", "a b"]}
MERGED = {"base": "ada/base", "adapters": ["/s/style:0.5", "bob/x@" + "0" * 40], "out": "m", "threads": 3}


@pytest.mark.parametrize(
    ("operation", "arguments", "line"),
    [
        ("extract", EXTRACTED, "loratools extract b t -o out --rank 8 --exact --include '*q*' --include 'a b'"),
        ("merge", MERGED, f"loratools merge ada/base style:0.5 bob/x@{'0' * 40} -o m"),
        ("fit", {"adapter": "a", "out": "o", "target": "vllm"}, "loratools fit a -o o --for vllm"),
        ("rescale", {"adapter": "a", "out": "o", "rslora": False}, "loratools rescale a -o o --no-rslora"),
        ("convert", {"adapter": "a", "out": "o", "base": "/b/c", "from_format": "kohya"}, "loratools convert a -o o --base c --from kohya"),
    ],
)
def test_the_command_is_one_that_parses(operation: str, arguments: dict[str, Any], line: str) -> None:
    made = _provenance.command({"operation": operation, "arguments": arguments})
    assert made == line
    name, *words = shlex.split(made)[1:]
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    command.make_context(name, words)


def test_the_errors_stand_beside_the_best_possible_ones() -> None:
    rows = [{"name": f"t{i}", "rank": 2, "error": i / 10, "optimal_error": i / 20} for i in range(1, 8)]
    rows.append({"name": "bias", "rank": None, "error": 0.0, "optimal_error": 0.0})
    arguments = {"base": "b", "tuned": "t", "out": "o", "rank": 2}
    receipt = {"operation": "extract", "arguments": arguments, "tensors": rows, "applied": 8, "expected": 8}
    text = "\n".join(_provenance.told(receipt))
    assert "of 7 matrices: median 0.4 (best possible at these ranks 0.2)" in text
    assert text.count("| `t") == 5 and "| `t7` | 2 | 0.7 | 0.35 |" in text


def test_receipts_of_other_making_are_taken_as_they_are() -> None:
    odd = {"operation": "merge", "arguments": None, "inputs": 3, "tensors": [1], "left_out": None, "history": {}}
    assert [_provenance.told(receipt) for receipt in ({}, {"operation": "x"})] == [[], []]
    assert "loratools merge None None -o OUT" in _provenance.told(odd)
