"""Weights stored transposed, deltas that wait for a base to tell, and those of tensors a base may lack."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Turned, TurnedAdditive, Unsettled, WherePresent, turned
from loratools.deltas.scaled import Scaled
from loratools.deltas.vera import VeRA
from loratools.errors import AmbiguousError, MatchError, ShapeError
from loratools.families import Family
from loratools.orientation import settle
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import low_rank, randn

FULL = Full(diff=to_ref(randn(4, 6, seed=0)))
ROWS = Scaled(l=to_ref(randn(4, seed=1)))


@pytest.mark.parametrize("delta", [FULL, ROWS, low_rank((4, 6), 2, 0).delta], ids=["additive", "other", "lora"])
def test_a_turned_delta_is_the_change_of_the_transpose(delta: Delta) -> None:
    W = randn(6, 4, seed=2)
    assert torch.allclose(applied(turned(delta), W), applied(delta, W.T.contiguous()).T, rtol=1e-15, atol=1e-15)
    assert blocks_agree(turned(delta), W) and turned(delta).spec(Spec("F32", (6, 4))) == Spec("F32", (6, 4))
    with pytest.raises(ShapeError):
        turned(delta).spec(Spec("F32", (4, 6)))


def test_it_has_the_kind_the_facts_and_the_product_of_its_delta() -> None:
    additive, other = turned(FULL), turned(ROWS)
    assert isinstance(additive, TurnedAdditive) and isinstance(other, Turned)
    assert (additive.kind, other.kind) == ("full", "ia3") and additive.facts() == FULL.facts() and set(other.refs()) == {"l"}
    assert additive.norm() == pytest.approx(FULL.norm()) and additive.product() is None
    shared = VeRA(A=to_ref(randn(2, 9, seed=0)), B=to_ref(randn(9, 2, seed=1)), b=to_ref(randn(4, seed=2)), d=to_ref(randn(2, seed=3)))
    fitted = TurnedAdditive(delta=shared).fitted(Spec("F32", (6, 4)))
    product = fitted.product()
    assert product is not None and (product[0] @ product[1]).shape == (6, 4) == fitted.shape()


def test_only_matrices_are_stored_transposed() -> None:
    with pytest.raises(ShapeError, match="only a matrix"):
        turned(FULL).spec(Spec("F32", (4, 6, 1)))


def settled(delta: Delta, shape: tuple[int, ...], *, model: str = "", flagged: bool = False) -> tuple[Delta, list[str]]:
    found, faults = settle({"c_proj.weight": delta}, {"c_proj.weight": Spec("F32", shape)}, Family({"model_type": model}), flagged=flagged)
    return found["c_proj.weight"], [str(fault) for fault in faults]


def test_shapes_decide_how_a_weight_lies() -> None:
    assert settled(Unsettled(delta=FULL), (4, 6)) == (FULL, [])
    assert isinstance(settled(Unsettled(delta=FULL), (6, 4))[0], TurnedAdditive)
    assert isinstance(settled(Unsettled(delta=ROWS), (6, 4))[0], Turned)
    assert settled(Unsettled(delta=ROWS), (4, 6, 3)) == (ROWS, [])


def test_a_square_is_the_model_types_to_tell() -> None:
    square = Scaled(l=to_ref(randn(4, seed=1)))
    assert settled(Unsettled(delta=square), (4, 4)) == (square, [])
    assert isinstance(settled(Unsettled(delta=square), (4, 4), model="gpt2")[0], Turned)
    assert isinstance(settled(Unsettled(delta=square, transposed=True), (4, 4))[0], Turned)
    (fault,) = settled(Unsettled(delta=square), (4, 4), flagged=True)[1]
    assert "--transposed" in fault


def test_a_change_of_a_saved_tensor_is_settled_too() -> None:
    chain = Chain(first=Replacement(value=to_ref(randn(6, 4, seed=0))), then=Unsettled(delta=ROWS))
    found = settled(chain, (6, 4))[0]
    assert isinstance(found, Chain) and isinstance(found.then, Turned)


def test_a_bias_that_a_base_lacks_is_left_out_and_not_expected() -> None:
    adapter = Adapter({"x.weight": ROWS, "x.bias": WherePresent(delta=ROWS)})
    weight, bias = {"x.weight": Spec("F32", (4, 6))}, {"x.bias": Spec("F32", (4,))}
    assert adapter.parameters == 4  # one tensor, in two places
    without, beside = adapter.resolve(weight), adapter.resolve(weight | bias)
    assert set(without) == {"x.weight"} and set(beside) == {"x.weight", "x.bias"} and without.left == beside.left == 0
    assert isinstance(beside["x.bias"], Scaled)
    with pytest.raises(MatchError):
        adapter.resolve(bias)


def test_a_mixed_model_without_a_type_leaves_its_squares_open() -> None:
    deltas = {"a.weight": Unsettled(delta=ROWS), "b.weight": Unsettled(delta=ROWS)}
    specs = {"a.weight": Spec("F32", (6, 4)), "b.weight": Spec("F32", (4, 4))}
    with pytest.raises(AmbiguousError, match=r"b\.weight"):
        Adapter(deltas).resolve(specs)
