"""TinyLoRA's vectors by their numbers and FRoD's bases by their kinds, written from deltas alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.frod import FRoD
from loratools.deltas.seeded import normal
from loratools.deltas.tinylora import TinyLoRA
from loratools.errors import LoratoolsError
from loratools.formats import encode
from loratools.formats.peft import decode
from loratools.tensors import to_ref
from tests.formats.matrix import Draw, check_same

D = Draw()
STATED = {"peft_type": "TINYLORA", "projection_seed": 7, "weight_tying": 0.5, "r": 9}
V, W = D(3), D(3)


def tiny(number: int, v: Any = V, **more: Any) -> TinyLoRA:
    made = TinyLoRA(A=D(2, 4), B=D(6, 2), v=v, P=to_ref(normal(7 + number, 3, 2)))
    return replace(made, **more)


def frod(V: Any, size: int = 4) -> FRoD:
    places = to_ref(torch.tensor([[0, 1], [1, 2]]))
    return FRoD(V=V, l=D(size), values=D(2), places=places, size=to_ref(torch.tensor([size, size])))


def written(stated: dict[str, Any] | None = None, **deltas: Delta) -> tuple[dict[str, Any], set[str]]:
    adapter = Adapter({f"{path.replace('__', '.')}.weight": delta for path, delta in deltas.items()}, {"peft": stated or {}})
    made = encode(adapter, "peft")
    check_same(adapter, decode(made))
    return dict(made.config or {}), {key.removeprefix("base_model.") for key in made.tensors}


def test_each_vector_under_the_number_its_layers_projections_tell() -> None:
    config, keys = written(STATED, a=tiny(2, W), b=tiny(0), c=tiny(1), d=tiny(3, W))
    assert {"tinylora_v.0", "tinylora_v.1"} < keys and "tinylora_v.2" not in keys
    assert (config["projection_seed"], config["weight_tying"], config["u"], config["r"]) == (7, 0.5, 3, 2)
    config, _ = written({**STATED, "r": 2}, a=tiny(0))
    assert config["r"] == 2


def test_one_layer_needs_no_seed() -> None:
    config, keys = written(a=tiny(0))
    assert config["save_projection"] is True and "tinylora_v.0" in keys
    config, keys = written(a=tiny(0, P=None, seed=11))
    assert (config["projection_seed"], config["save_projection"]) == (11, False) and "model.a.tinylora_P" not in keys


def test_bases_by_kind() -> None:
    one, other = D(4, 4), D(4, 4)
    _, keys = written(layers__0__attn__q=frod(one), layers__1__attn__q=frod(one), layers__0__mlp__up=frod(other))
    assert {f"frod_{name}.{kind}" for name in ("V", "s_indices", "s_size") for kind in ("attn_q", "mlp_up")} < keys


REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, Delta], str]] = {
    "several layers without a seed": (None, {"a": tiny(0), "b": tiny(1)}, r"a\.weight: the vectors of several layers are told apart by"),
    "projections of no layer": (
        STATED, {"a": tiny(0), "b": tiny(1), "c": tiny(2), "d": tiny(9)}, r"d\.weight: which of the shared vectors .* these are no layer's"
    ),
    "two vectors of one number": (STATED, {"a": tiny(0), "b": tiny(1, W), "c": tiny(2), "d": tiny(3)}, "one vector of these layers for"),
    "several that are drawn": (
        None, {"a": tiny(0, P=None, seed=1), "b": tiny(0, P=None, seed=1)}, "drawn in an order of the layers that only the model tells"
    ),
    "two ranks": (STATED, {"a": tiny(0), "b": tiny(1, A=D(1, 4), B=D(6, 1), P=to_ref(normal(8, 3, 1)))}, "one r for all modules"),
    "two bases of a kind": (None, {"l__0__attn__q": frod(D(4, 4)), "l__1__attn__q": frod(D(4, 4))}, "one V of a kind for all modules"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit(case: str) -> None:
    stated, deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said):
        written(stated, **deltas)
