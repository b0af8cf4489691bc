"""check: what becomes of each kind in each target; shares, notes, and what a base tells."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import loratools
from loratools.adapter import Adapter
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, OptionError
from loratools.formats import save
from loratools.ops._base import Base
from loratools.tensors import read_tensor, to_ref
from loratools.workflows._checking import Finding, findings
from loratools.workflows._rules import hits, scale
from loratools.workflows._subject import Subject
from loratools.workflows._weights import weights
from loratools.workflows.targets import names
from tests.ops._lora import dense
from tests.strategies import randn
from tests.workflows._adapters import MADE, NAMES, SHAPES, UP, Q, V, base, folder, low, made_for, of, ref

SCHEMA = json.loads((Path(__file__).parents[2] / "spec" / "check.schema.json").read_text())
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": True}


@pytest.mark.parametrize("name", names())
def test_a_plain_adapter_in_memory_is_clean(name: str) -> None:
    assert findings(made_for(name, "plain"), name) == []


# the worst that each target does to an adapter in memory: c clean, r refuse, i ignore, m mis-scale
VERDICTS = """
                comfyui diffusers kohya llama.cpp mlx peft sglang vllm
plain             c       c         c     c         c   c    c      c
rslora            c       c         c     m         c   c    m      c
patterns          c       c         c     m         r   c    r      m
bfloat16          c       c         c     m         m   c    m      m
dora              m       r         i     r         r   r    r      r
dora_on_all       m       c         i     r         c   c    r      r
dora_in           c       r         i     r         r   r    r      r
loha              c       r         i     r         r   r    r      r
lokr              c       r         i     r         r   r    r      r
pissa             i       r         i     m         m   r    m      r
rotated           m       r         i     r         r   r    r      r
scaled            i       r         i     r         r   r    r      r
full              c       r         i     r         r   r    r      r
saved             i       r         i     r         r   c    i      r
rows              i       r         i     r         r   c    i      r
bias              c       r         i     r         r   r    r      r
norm              c       r         i     i         r   r    r      r
embedding         i       r         i     m         m   c    m      m
conv              c       c         c     r         r   c    r      r
head              c       c         c     m         m   c    m      m
high_rank         c       c         c     m         r   c    r      r
passengers        i       i         i     r         r   i    i      r
"""
_, HEADER, *LINES = VERDICTS.splitlines()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_what_becomes_of_each_kind_in_each_target(line: str) -> None:
    word, *verdicts = line.split()
    for name, verdict in zip(HEADER.split(), verdicts, strict=True):
        found = findings(made_for(name, word.replace("_", " ")), name)
        losses = {one.kind for one in found}
        worst = next((loss for loss in ("refuse", "ignore", "mis-scale") if loss in losses), "clean")
        assert worst[0] == verdict, (name, word, [(one.rule, one.tensor) for one in found])


def test_every_kind_has_a_verdict() -> None:
    assert {line.split()[0].replace("_", " ") for line in LINES} == set(MADE)


@pytest.mark.parametrize("name", ["peft", "vllm", "sglang"])
def test_a_plain_folder_is_clean(name: str, tmp_path: Path) -> None:
    found = loratools.check(folder(tmp_path / "a"), name)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert (found["clean"], found["findings"], found["tensors"], found["format"]) == (True, [], 3, "peft")


def test_shares_are_parts_of_the_squared_norm(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", alpha_pattern={"v_proj": 16})
    (found,) = findings(path, "vllm")
    loaded = loratools.load(path)
    squares = {name: float(dense(delta).square().sum()) for name, delta in loaded.items()}
    assert found.tensor == V
    assert (found.kind, found.found, found.fit) == ("mis-scale", "scaled by 2 instead of 8", "bake")
    assert found.share == pytest.approx(squares[V] / sum(squares.values()), rel=1e-12)
    assert found.source.file == "vllm/lora/peft_helper.py"


def test_what_only_a_base_tells_has_no_share_without_one(tmp_path: Path) -> None:
    save(MADE["saved"](), tmp_path / "a")
    found = loratools.check(tmp_path / "a", "vllm")
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert {row["rule"]: row["share"] for row in found["findings"]} == {"modules_to_save": None, "saved": None}
    assert found["findings"][0]["unmeasured"] == "how large it is depends on the base's weight: give --base"
    assert found["unmeasured"] == ["score.weight"]


def test_with_the_base_everything_has_its_share(tmp_path: Path) -> None:
    adapter = MADE["saved"]()
    save(adapter, tmp_path / "a")
    found = loratools.check(tmp_path / "a", "vllm", base=base(tmp_path / "base"))
    squares = {name: float(dense(delta).square().sum()) for name, delta in adapter.items() if name in SHAPES}
    score = adapter["score.weight"]
    assert isinstance(score, Replacement)
    moved = float((read_tensor(score.value, torch.float64) - randn(3, 8, seed=14).to(torch.float64)).square().sum())
    share = moved / (moved + math.fsum(squares.values()))
    assert [row["share"] for row in found["findings"]] == [pytest.approx(share, rel=1e-12)] * 2
    assert found["unmeasured"] == []


def test_a_dora_is_weighed_beside_its_weight(tmp_path: Path) -> None:
    save(MADE["dora on all"](), tmp_path / "a")
    found = findings(tmp_path / "a", "vllm", base=base(tmp_path / "base"))
    assert {one.tensor for one in found} == {Q, V, UP}
    assert sum(one.share or 0.0 for one in found) == pytest.approx(1)


def test_a_tied_head_is_seen_with_its_base_only(tmp_path: Path) -> None:
    save(MADE["head"](), tmp_path / "a")
    assert "tied" not in {one.rule for one in findings(tmp_path / "a", "llama.cpp")}
    found = [one for one in findings(tmp_path / "a", "llama.cpp", base=base(tmp_path / "base")) if one.rule == "tied"]
    assert [(one.tensor, one.kind, one.fit) for one in found] == [("lm_head.weight", "refuse", "none")]


def test_a_whole_adapter_is_all_of_it(tmp_path: Path) -> None:
    (found,) = findings(folder(tmp_path / "a"), "mlx")
    assert (found.rule, found.tensor, found.share, found.fit) == ("format", "the whole adapter", 1.0, "write")


def test_a_note_is_no_finding(tmp_path: Path) -> None:
    wide = of(q=low(rank=32, alpha=64.0), v=low(V, rank=32, alpha=64.0))
    save(replace(wide, deltas={name: wide[name] for name in (Q, V)}), tmp_path / "a")
    found = loratools.check(tmp_path / "a", "vllm")
    assert found["clean"]
    assert found["notes"] == [
        "start vLLM with a --max-lora-rank of 32, 64, 128, 256, 320 or 512 that holds this rank; its default is 16 "
        f"({Q}: rank 32, above 16)"
    ]


def test_a_finding_is_what_the_document_says(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", use_rslora=True)
    rows = loratools.check(path, "sglang")["findings"]
    assert [Finding(**{**row, "source": one.source}) for row, one in zip(rows, findings(path, "sglang"), strict=True)] == findings(
        path, "sglang"
    )


def test_a_target_or_a_predicate_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="unknown --for: found tgi"):
        loratools.check(of(), "tgi")
    with pytest.raises(FormatError, match="no such predicate: found colour, expected format or kind"):
        hits("colour", {}, Subject(of(), ("peft",)))
    with pytest.raises(FormatError, match=r"settings of the predicate rank: .*unexpected keyword argument 'below'"):
        hits("rank", {"below": 4}, Subject(of(), ("peft",)))


@pytest.mark.parametrize(
    ("when", "settings", "word", "places"),
    [
        ("name", {"at": r"\.v_proj\.weight$"}, "plain", [V]),
        ("name", {"off": "mlp", "sort": "language"}, "plain", [Q, V]),
        ("dtype", {"takes": ["F32"]}, "bfloat16", [Q, V, UP]),
        ("dtype", {"takes": ["F32"]}, "plain", []),
        ("kind", {"kinds": ["full"], "at": r"\.bias$"}, "bias", [NAMES["bias"]]),
        ("kind", {"kinds": ["full"], "at": r"\.bias$"}, "norm", []),
        ("scale", {"per": "one"}, "plain", [Q, V, UP]),
        ("scale", {"per": "tensor"}, "patterns", [V, UP]),
    ],
)  # fmt: skip
def test_predicates_that_targets_may_use(when: str, settings: dict[str, Any], word: str, places: list[str]) -> None:
    assert [hit.place for hit in hits(when, settings, Subject(MADE[word](), ("peft",)))] == places


def test_why_a_change_beside_its_base_has_no_size(tmp_path: Path) -> None:
    adapter = Adapter({"head.weight": Replacement(value=ref(3, 8)), "score.weight": Replacement(value=ref(5, 8))})
    found = weights(adapter, Base(base(tmp_path / "base"), {"embedding": (), "transposed": ()}))
    assert found == {
        "head.weight": "the base has no such tensor to compare it with", "score.weight": "it is of another shape than the base's",
    }  # fmt: skip


@pytest.mark.parametrize(("alpha", "found"), [(0, 0), (4, 1)])
def test_an_alpha_of_0_is_no_missing_one(alpha: float, found: int) -> None:
    """The config's alpha against a LoRA whose scaling is 0: where both are, nothing is mis-scaled; a missing one is peft's 8."""
    idle = LowRank(A=to_ref(torch.ones(2, 3)), B=to_ref(torch.ones(4, 2)), alpha=0.0)
    given = Subject(Adapter({"q.weight": idle}), ("peft",), config=CONFIG | {"lora_alpha": alpha})
    assert len(list(scale(given))) == found
