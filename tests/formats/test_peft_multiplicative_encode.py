"""RoAd, HiRA and GLoRA written from deltas alone: the kinds of their parts, the zeros of a module without bias, what they cannot say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Additive, Delta
from loratools.deltas.coupled import Coupled
from loratools.deltas.full import Full
from loratools.deltas.laid import turned
from loratools.deltas.lowrank import LowRank
from loratools.deltas.modulated import Modulated, Spread
from loratools.deltas.paired import Paired
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from loratools.tensors import read_tensor, to_ref
from tests.formats.matrix import Draw, check_same

D = Draw()
ROAD = Paired(theta=D(3), alpha=D(3), variant=1, group=2)
LOW = LowRank(A=D(2, 4), B=D(6, 2), alpha=2.0, layer="linear")
BIAS = Coupled(own=Modulated(times=Spread(value=D(6)), plus=Spread(value=D(6))), left=D(4, 2), right=D(2, 1))


def zeros(*shape: int) -> Full:
    return Full(diff=to_ref(torch.zeros(shape)))


def made(stated: dict[str, Any] | None = None, **deltas: Delta) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], Adapter]:
    adapter = Adapter({name.replace("__", "."): delta for name, delta in deltas.items()}, {"peft": stated or {}})
    found = encode(adapter, "peft")
    again = decode(found)
    check_same(adapter, Adapter({name: again[name] for name in adapter}))
    shapes = {key.removeprefix("base_model.model."): ref.spec.shape for key, ref in found.tensors.items()}
    return dict(found.config or {}), shapes, again


def test_pairs_with_and_without_their_bias() -> None:
    config, shapes, _ = made(a__weight=ROAD, a__bias=ROAD, b__weight=ROAD)
    assert (config["variant"], config["group_size"]) == ("road_1", 2)
    assert set(shapes) == {f"{path}.road_{name}" for path in "ab" for name in ("theta", "alpha")}


def test_hira_of_every_layer() -> None:
    conv = LowRank(A=D(2, 4, 3, 3), B=D(6, 2), alpha=2.0)
    table = LowRank(A=D(2, 4), B=D(9, 2), alpha=2.0, layer="embedding")
    config, shapes, _ = made(a__weight=Modulated(times=LOW), b__weight=Modulated(times=conv), c__weight=Modulated(times=table))
    assert config["r"] == 2 and shapes["b.hira_B"] == (6, 2, 1, 1) and shapes["c.hira_embedding_A"] == (2, 9)
    lying = turned(Modulated(times=LOW))  # of a weight stored (in, out), once a base told that it is
    found = encode(Adapter({"a.weight": lying}), "peft")
    straight = {key.removeprefix("base_model.model."): ref.spec.shape for key, ref in found.tensors.items()}
    assert straight == {"a.hira_A": (2, 4), "a.hira_B": (6, 2)} and (found.config or {})["fan_in_fan_out"] is True


PARTS: dict[str, Additive] = {
    "lora": LOW, "vector": Spread(value=D(6, 1)), "constant": Spread(value=D(1), single=True), "none": zeros(6, 4),
}  # fmt: skip
VECTORS = Modulated(times=PARTS["vector"], plus=PARTS["vector"])


@pytest.mark.parametrize("kind", PARTS)
def test_glora_by_the_kinds_of_its_parts(kind: str) -> None:
    part = PARTS[kind]
    own = Modulated(times=zeros(6), plus=zeros(6)) if kind == "none" else BIAS.own
    bias = Coupled(own=own, left=BIAS.left, right=BIAS.right) if kind == "lora" else Coupled(own=own, left=D(4, 1))
    config, shapes, _ = made(a__weight=Modulated(times=part, plus=part), a__bias=bias)
    ends = {"lora": ("Xd", "Xu"), "none": ("zeros",)}.get(kind, ("X",))
    assert config["config_A_B"] == kind and {f"a.glora_{name}.{end}" for name in "AB" for end in ends} < set(shapes)
    assert config["config_C"] == ("lora" if kind == "lora" else "vector")
    assert config["config_D_E"] == ("none" if kind == "none" else "vector")


def test_a_module_without_bias_has_zeros() -> None:
    _, shapes, again = made(a__weight=Modulated(times=LOW, plus=LOW), a__bias=BIAS, b__weight=Modulated(times=LOW, plus=LOW))
    assert [shapes[f"b.glora_{name}.zeros"] for name in "CDE"] == [(4, 1), (6,), (6,)]
    assert not any(read_tensor(ref).any() for ref in again["b.bias"].refs().values())


WEIGHT = Modulated(times=LOW, plus=LOW)
REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "another bias": ({"a__weight": ROAD, "a__bias": replace(ROAD, theta=D(3))}, r"a\.bias: peft's RoAd turns a bias with its weight"),
    "two groups": ({"a__weight": ROAD, "b__weight": replace(ROAD, theta=D(4), alpha=D(4), group=4)}, "one group_size for all modules"),
    "HiRA scaled": ({"a__weight": Modulated(times=replace(LOW, alpha=3.0))}, r"a\.weight: peft's HiRA has no scaling: found 1.5"),
    "GLoRA scaled": ({"a__weight": Modulated(times=LOW, plus=replace(LOW, alpha=3.0)), "a__bias": BIAS}, "GLoRA has no scaling: found 1.5"),
    "another bias of GLoRA's": ({"a__weight": WEIGHT, "a__bias": Full(diff=D(6))}, "peft's GLORA cannot say a whole-tensor delta"),
    "two kinds": ({"a__weight": WEIGHT, "b__weight": VECTORS}, "one config_A_B for all modules"),
    "zeros of an unknown size": ({"a__weight": VECTORS}, "zeros as large as the weight's sides, which only the base tells"),
    "a part of another kind": (
        {"a__weight": Modulated(times=LOW, plus=Full(diff=D(6, 4), scale=2.0)), "a__bias": BIAS}, "GLoRA cannot say a whole-tensor part"
    ),
    "a bias without its weight": ({"a__weight": WEIGHT, "a__bias": BIAS, "b__bias": BIAS}, r"b\.bias: a change of no such kind beside"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_say(case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said):
        made(**deltas)
