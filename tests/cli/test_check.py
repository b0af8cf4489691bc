"""loratools check as a person and as a program see it: what is lost, how much, who says so, what to do; and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from loratools.cli import run
from loratools.cli._checked import checked
from loratools.formats import save
from loratools.workflows.check import check
from loratools.workflows.targets import target_of
from tests.workflows._adapters import MADE, base, folder, of

SCHEMA = json.loads((Path(__file__).parents[2] / "spec" / "check.schema.json").read_text())


def test_a_clean_adapter_is_exit_0_in_two_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "a")
    rules = sum(rule.loses != "note" for rule in target_of("vllm").rules)
    assert run(["check", str(path), "--for", "vllm"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"adapter  {path}: 3 deltas, peft", f"clean    vLLM takes all of it, by {rules} rules"]


def test_what_is_lost_is_exit_1_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "a", use_rslora=True)
    assert run(["check", str(path), "--for", "sglang"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"adapter  {path}: 3 deltas, peft",
        "for      SGLang, which does not take all of it",
        "",
        "mis-scales  SGLang scales by lora_alpha / r and does not read use_rslora.",
        "            model.layers.0.mlp.up_proj.weight: scaled by 2 instead of 2.828",
        "            model.layers.0.self_attn.q_proj.weight: scaled by 2 instead of 2.828",
        "            model.layers.0.self_attn.v_proj.weight: scaled by 2 instead of 2.828",
        "            3 places: 100 % of ‖ΔW‖²",
        "            read from sglang 0.5.23, python/sglang/srt/lora/lora.py: LoRAAdapter.__init__",
        "",
        f"remedy  loratools fit {path} -o OUT --for sglang",
    ]


def test_json_is_the_document_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "a", use_rslora=True)
    assert run(["check", str(path), "--for", "sglang", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert found == check(path, "sglang") | {"path": str(path)}


def test_the_remedy_asks_for_a_base_where_one_is_needed(tmp_path: Path) -> None:
    save(MADE["dora on all"](), tmp_path / "a")
    assert checked(check(tmp_path / "a", "vllm"), None)[-1] == f"remedy  loratools fit {tmp_path / 'a'} -o OUT --for vllm --base BASE"
    there = str(base(tmp_path / "my base"))
    lines = checked(check(tmp_path / "a", "vllm", base=there), None, base=there)
    assert lines[-1] == f"remedy  loratools fit {tmp_path / 'a'} -o OUT --for vllm --base '{there}'"


def test_what_no_fit_repairs_is_told(tmp_path: Path) -> None:
    save(MADE["conv"](), tmp_path / "a")
    lines = checked(check(tmp_path / "a", "vllm"), None)
    assert lines[-1] == "remedy  none that keeps it an adapter: merge it into the base with loratools merge, and run that"


def test_another_model_than_the_runtime_has_is_told_with_those_that_have_it(tmp_path: Path) -> None:
    save(of(), tmp_path / "a")
    lines = checked(check(tmp_path / "a", "comfyui"), None)
    assert "the whole adapter: modules of a language model, model.layers.0.mlp.up_proj.weight …" in "\n".join(lines)
    assert lines[-1] == (
        "remedy  ComfyUI runs no model of this kind; for a language model: --for peft, vllm, sglang, llama.cpp or mlx"
    )


def test_a_narrow_terminal_gets_no_line_wider_than_itself(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", use_rslora=True, alpha_pattern={"v_proj": 16})
    found = check(path, "sglang") | {"path": "a"}
    assert max(map(len, checked(found, 60))) <= 60


def test_refusals_come_before_what_is_ignored_and_mis_scaled(tmp_path: Path) -> None:
    save(MADE["saved"](), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True, "alpha_pattern": {"v_proj": 16}}))
    lines = checked(check(tmp_path / "a", "sglang"), None)
    verbs = [line.split()[0] for line in lines if line.startswith(("refuses", "ignores", "mis-scales"))]
    assert verbs == ["refuses", "ignores", "mis-scales"]
    assert "share of ΔW unknown: how large it is depends on the base's weight: give --base" in "\n".join(lines)
    assert "of what can be measured without the base" in "\n".join(lines)


def test_many_places_are_counted(tmp_path: Path) -> None:
    found = check(folder(tmp_path / "a", use_rslora=True), "sglang")
    row = found["findings"][0]
    found["findings"] = [row | {"tensor": f"part{letter}.weight", "share": 0.1} for letter in "abcdefg"]
    assert "            … and 3 more" in checked(found, None)


def test_a_runtime_there_is_not_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(folder(tmp_path / "a")), "--for", "tgi"]) == 2
    assert "'tgi' is not one of 'comfyui', 'diffusers'" in capsys.readouterr().err
    assert run(["check", str(tmp_path / "a")]) == 2
