"""LoRA on parameters written from deltas alone: their nesting, packing and axes, and what only a base would tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.experts import Experts
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.base import Container
from loratools.formats.peft import decode
from loratools.tensors import read_tensor
from tests.formats.matrix import Draw

D = Draw()
M = "layers.0.mlp.experts"
UP = Experts(A=D(6, 4), B=D(8, 6), alpha=4.0, experts=3)  # ranks of 2
DOWN = Experts(A=D(3, 8), B=D(4, 3), alpha=4.0, experts=3)
LOW = LowRank(A=D(2, 4), B=D(6, 2), alpha=4.0, layer="linear")


def written(model: dict[str, Any] | None = None, stated: dict[str, Any] | None = None, **deltas: Delta) -> Container:
    adapter = Adapter({name.replace("__", "."): delta for name, delta in deltas.items()}, {"peft": stated or {}}, model=model or {})
    return encode(adapter, "peft")


def keys(made: Container) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix("base_model.model."): ref.spec.shape for key, ref in made.tensors.items()}


def dense(found: Experts) -> torch.Tensor:
    """ΔW of the stack in float64."""
    lows = [found.expert(index) for index in range(found.experts)]
    return torch.stack([low.scaling * read_tensor(low.B, torch.float64) @ read_tensor(low.A, torch.float64) for low in lows])


def test_the_first_that_a_model_registers_is_innermost() -> None:
    made = written(**{f"{M}.down_proj": DOWN, f"{M}.gate_up_proj": UP, "layers.0.q.weight": LOW})
    assert keys(made) == {
        f"{M}.lora_A.weight": (3, 8), f"{M}.lora_B.weight": (4, 3), f"{M}.base_layer.lora_A.weight": (6, 4),
        f"{M}.base_layer.lora_B.weight": (8, 6), "layers.0.q.lora_A.weight": (2, 4), "layers.0.q.lora_B.weight": (6, 2),
    }  # fmt: skip
    config = dict(made.config or {})
    assert config["target_parameters"] == [f"{M}.down_proj", f"{M}.gate_up_proj"] and config["target_modules"] == ["layers.0.q"]
    assert config["r"] == 2 and config["rank_pattern"] == {r"^layers\.0\.mlp\.experts\.down_proj": 1}
    assert set(decode(made)) == {f"{M}.down_proj", f"{M}.gate_up_proj", "layers.0.q.weight"}


def test_a_matrix_that_is_no_layers_weight() -> None:
    made = written(router__kernel=LOW)
    assert keys(made) == {"router.lora_A.weight": (2, 4), "router.lora_B.weight": (6, 2)}
    assert (made.config or {})["target_parameters"] == ["router.kernel"] and (made.config or {})["target_modules"] is None
    made = written(stated={"target_parameters": ["router.weight"]}, a__router__weight=LOW)
    assert (made.config or {})["target_parameters"] == ["a.router.weight"]  # as its config had it


@pytest.mark.parametrize("packing", ["rank_major", "grouped_by_expert"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_laid_as_the_version_written_for_has_it(kind: str, turned: bool, packing: str) -> None:
    """The same change of the same stack, whichever way A reads; mixtral's is read straight by peft 0.21, gpt_oss' the other way round."""
    given = replace(UP, turned=turned, packing=packing)
    made = written({"model_type": kind}, {"peft_version": "0.18.0"}, **{f"{M}.gate_up_proj": given})
    A, B = (made.tensors[f"base_model.model.{M}.lora_{side}.weight"] for side in "AB")
    found = Experts(A=A, B=B, alpha=4.0, experts=3, turned=kind == "gpt_oss")
    assert (made.config or {})["peft_version"] == "0.21.2"
    torch.testing.assert_close(dense(found), dense(given), rtol=0, atol=0)


def on_parameters(**more: Any) -> Adapter:
    """A file's wrapper, of which the base has not told what it is about."""
    tensors = {f"base_model.model.{M}.lora_A.weight": UP.A, f"base_model.model.{M}.lora_B.weight": UP.B}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["gate_up_proj", "down_proj"]} | more
    return decode(Container(tensors, config=settings))


def test_what_only_a_base_would_tell_goes_back_as_it_came() -> None:
    source = on_parameters(peft_version="0.18.0")
    made = encode(source, "peft")
    assert keys(made) == {f"{M}.lora_A.weight": (6, 4), f"{M}.lora_B.weight": (8, 6)}
    config = dict(made.config or {})
    assert config["target_parameters"] == [f"{M}.down_proj", f"{M}.gate_up_proj"] and config["peft_version"] == "0.18.0"
    for more in ({"r": None}, {"lora_B_layout": "grouped_by_expert"}):
        with pytest.raises(LoratoolsError, match=r"of which only the base tells which it is.*; give convert --base BASE"):
            encode(on_parameters(**more), "peft")


BIASED = DoRA(direction=LOW, magnitude=D(6, 1))
REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "an unknown order": (
        {"m.one": LOW, "m.other": LOW}, r"m\.one: peft nests the parameters .* which is not known of these: found m\.one, m\.other; write"
    ),
    "no module": ({"kernel": LOW}, r"kernel: peft puts LoRA on a module's parameters, and this has no module"),
    "an embedding": ({"m.table": replace(LOW, layer="embedding")}, r"m\.table: peft's LoRA on parameters knows no embedding ones"),
    "an unknown axis": ({f"{M}.up_proj": replace(UP, turned=True)}, r"which axis of a stack A reads .* nothing tells; give convert --base"),
    "DoRA beside": ({f"{M}.up_proj": UP, "q.weight": BIASED}, r"up_proj: peft allows no DoRA beside LoRA on parameters; write the"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said):
        encode(Adapter(deltas, {"peft": {"peft_version": "0.07"}}), "peft")
