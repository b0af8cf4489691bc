"""FlatDoRA: the axis by the shape, by the norms, or an error with both readings; then it is the DoRA that was meant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.deltas.dora import DoRA
from loratools.deltas.flat import FlatDoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, ShapeError
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.deltas.test_magnitudes import reader, spread
from tests.strategies import low_rank, randn


def flat(shape: tuple[int, ...], m: Tensor) -> FlatDoRA:
    direction = low_rank(shape, 2, 0, alpha=0.1).delta
    assert isinstance(direction, LowRank)
    return FlatDoRA(direction=direction, magnitude=to_ref(m))


@pytest.mark.parametrize(
    ("shape", "size", "made"),
    [((6, 4), 6, (6, 1)), ((6, 4), 4, (1, 4)), ((6, 4, 3), 6, (6, 1, 1)), ((6, 1), 1, (1, 1)), ((1, 6), 6, (1, 6)), ((1, 1), 1, (1, 1))],
)
def test_the_shape_tells(shape: tuple[int, ...], size: int, made: tuple[int, ...]) -> None:
    delta, W = flat(shape, 1 + randn(size, seed=1).abs()), randn(*shape, seed=2)
    meant = DoRA(direction=delta.direction, magnitude=delta.magnitude.reshape(*made))
    assert torch.equal(applied(delta, W), applied(meant, W)) and blocks_agree(delta, W)
    assert delta.kind == "dora" and delta.facts()["rank"] == 2 and set(delta.refs()) == {"A", "B", "magnitude"}
    assert torch.equal(applied(delta.map(lambda ref: to_ref(read_tensor(ref))), W), applied(meant, W))


@pytest.mark.parametrize("axis", [1, 0])
def test_on_a_square_the_norms_tell(axis: int) -> None:
    W = spread(48)
    norm = W.double().norm(dim=axis)
    delta = flat((48, 48), norm * (1 + 0.02 * randn(48, seed=5)))
    found = delta.decided(Spec("F64", (48, 48)), reader(W))
    assert found.axis == ("out" if axis else "in") and torch.equal(applied(delta, W), applied(found, W))


def test_on_a_square_that_fits_both_ways_it_is_an_error() -> None:
    W = randn(64, 64, seed=0)
    with pytest.raises(AmbiguousError, match=r"one for each (row|column), off ‖W‖ by .*; or one for each (row|column), off ‖W‖ by"):
        applied(flat((64, 64), W.norm(dim=1) * (1 + 0.3 * randn(64, seed=1))), W)


@pytest.mark.parametrize(("shape", "m"), [((6, 4), (5,)), ((6, 4), (6, 1)), ((6, 4, 3), (4,)), ((6, 4), ())])
def test_magnitudes_that_fit_no_axis(shape: tuple[int, ...], m: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="the magnitudes fit no axis"):
        FlatDoRA(direction=Full(diff=to_ref(torch.ones(shape))), magnitude=to_ref(torch.ones(m))).spec(Spec("F32", shape))
