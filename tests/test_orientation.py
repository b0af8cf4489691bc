"""Orientation: shapes tell; squares by the model's type, the user's globs or the file's flag, else refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, ShapeError
from loratools.families import Family
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.strategies import randn


def low(out: int = 4, inner: int = 6, layer: str = "unknown") -> LowRank:
    return LowRank(A=to_ref(randn(2, inner, seed=0)), B=to_ref(randn(out, 2, seed=1)), alpha=4.0, layer=layer)


def dora(out: int = 4, inner: int = 6) -> DoRA:
    return DoRA(direction=low(out, inner), magnitude=to_ref(torch.ones(out, 1)))


def adapter(*names: str, delta: Delta | None = None) -> Adapter:
    return Adapter({name: delta or low() for name in names})


def base(*names: str, shape: tuple[int, ...] = (4, 6)) -> dict[str, Spec]:
    return dict.fromkeys(names, Spec("F32", shape))


def layer(delta: Delta) -> str:
    found = delta.direction if isinstance(delta, DoRA) else delta
    assert isinstance(found, LowRank)
    return found.layer


@pytest.mark.parametrize("make", [low, dora])
def test_shapes_tell(make: object) -> None:
    found = Adapter({"q.weight": make(4, 6)}).resolve(base("q.weight", shape=(6, 4)))["q.weight"]  # type: ignore[operator]
    assert layer(found) == "transposed"
    if isinstance(found, DoRA):
        assert found.axis == "in" and found.magnitude.spec.shape == (1, 4)
    assert layer(Adapter({"q.weight": make(4, 6)}).resolve(base("q.weight"))["q.weight"]) == "linear"  # type: ignore[operator]


SQUARE = {"c_proj.weight": Spec("F32", (6, 6)), "c_attn.weight": Spec("F32", (6, 18))}


def squares(**metadata: object) -> Adapter:
    return Adapter({"c_proj.weight": dora(6, 6), "c_attn.weight": low(18, 6)}, metadata={"peft": metadata})


def test_a_square_is_told_by_the_models_type_or_the_user() -> None:
    for family in (Family({"model_type": "gpt2"}), Family({}, more_transposed=("c_proj",))):
        found = squares().resolve(SQUARE, family)
        assert {layer(delta) for delta in found.values()} == {"transposed"}
    named = squares().resolve(SQUARE, Family({}, more_transposed=("c_attn",)))
    assert layer(named["c_proj.weight"]) == "linear"  # the user said which are transposed


@pytest.mark.parametrize("family", [Family({}), Family({"model_type": "unheard of"}), Family({"model_type": "llama"})])
def test_a_square_beside_transposed_weights_of_an_unknown_model_is_refused(family: Family) -> None:
    with pytest.raises(AmbiguousError, match=r"c_proj\.weight: a square weight.*--transposed"):
        squares().resolve(SQUARE, family)


def test_a_square_alone_is_linear_unless_the_file_says_it_saw_transposed_ones() -> None:
    alone = Adapter({"q.weight": low(6, 6)})
    assert layer(alone.resolve(base("q.weight", shape=(6, 6)))["q.weight"]) == "linear"
    flagged = dataclasses.replace(alone, metadata={"peft": {"fan_in_fan_out": True}})
    with pytest.raises(AmbiguousError):
        flagged.resolve(base("q.weight", shape=(6, 6)))
    assert layer(flagged.resolve(base("q.weight", shape=(6, 6)), Family({"model_type": "gpt2"}))["q.weight"]) == "linear"


def test_shapes_that_do_not_fit() -> None:
    for shape in ((4, 5), (5, 6), (4,), (4, 6, 2)):
        with pytest.raises(ShapeError, match=r"q\.weight: does not fit"):
            adapter("q.weight").resolve(base("q.weight", shape=shape))


