"""Magnitudes beside norms: the right axis and the right norms are the nearest, drift is what was put in, and near misses are said."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.base import Read
from loratools.deltas.magnitudes import Fit, Norms, axis_of, clear, drift, fits, named, norms
from loratools.errors import AmbiguousError
from loratools.refs import Spec
from tests.strategies import low_rank, randn, seeds


def reader(W: Tensor) -> Read:
    flat = W.double().flatten(1)

    def read(rows: int) -> Iterator[tuple[slice, Tensor]]:
        return ((slice(i, min(i + rows, len(flat))), flat[i : i + rows].clone()) for i in range(0, len(flat), rows))

    return read


def measured(W: Tensor, rank: int = 2, seed: int = 1, alpha: float = 0.1) -> tuple[Norms, Tensor]:
    """The norms, and W + ΔW by plain algebra."""
    drawn = low_rank(tuple(W.shape), rank, seed, alpha=alpha)
    return norms(Spec("F64", tuple(W.shape)), reader(W), drawn.delta), drawn.dense(W.double())  # type: ignore[arg-type]


def spread(size: int, seed: int = 0) -> Tensor:
    """A square weight whose rows and columns are of very different sizes, as trained ones are."""
    return randn(size, size, seed=seed) * (1 + randn(size, 1, seed=seed + 1).abs()) * (1 + randn(1, size, seed=seed + 2).abs())


@given(st.integers(1, 300), st.integers(1, 200), seeds)
def test_all_norms_in_one_pass(rows: int, columns: int, seed: int) -> None:
    W = randn(rows, columns, seed=seed)
    found, V = measured(W)
    for axis, side in (("out", 1), ("in", 0)):
        # sums of up to 300 squares of like size in float64
        assert torch.allclose(found.base[axis], W.double().square().sum(side).sqrt(), rtol=1e-13)
        assert torch.allclose(found.changed[axis], V.square().sum(side).sqrt(), rtol=1e-12)


def test_a_convolution_has_a_norm_for_each_output_and_each_input_channel() -> None:
    W = randn(6, 4, 3, 3, seed=0)
    found, V = measured(W)
    assert torch.allclose(found.changed["out"], V.flatten(1).norm(dim=1), rtol=1e-12)
    assert torch.allclose(found.changed["in"], V.transpose(0, 1).flatten(1).norm(dim=1), rtol=1e-12)
    assert torch.allclose(found.base["in"], W.double().transpose(0, 1).flatten(1).norm(dim=1), rtol=1e-12)


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("against", ["base", "changed"])
def test_the_four_conventions_are_told_apart(axis: str, against: str) -> None:
    """Magnitudes made by each, moved by a per cent: the reading that made them is the nearest one, on the axis and the norm."""
    found, _ = measured(spread(64), rank=8, alpha=4.0)
    m = getattr(found, against)[axis] * (1 + 0.01 * randn(64, seed=9).double())
    best, other = fits(m, found)
    assert best.axis == axis and min(("base", "changed"), key=lambda side: getattr(best, side)) == against
    assert getattr(best, against) == pytest.approx(0.01, rel=0.3) and other.best > 5 * best.best
    assert axis_of(m, found) == axis


def test_drift_is_what_was_put_in() -> None:
    found, _ = measured(spread(64))
    moved = torch.linspace(-0.02, 0.03, 64, dtype=torch.float64)
    told = drift(found.base["out"] * (1 + moved), found.base["out"])
    assert told == {"min": pytest.approx(-0.02), "median": pytest.approx(float(moved.median())), "max": pytest.approx(0.03)}


def test_norms_of_zero() -> None:
    norm = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert drift(torch.tensor([0.0, 2.0]), norm) == {"min": 0.0, "median": 0.0, "max": 0.0}
    assert drift(torch.tensor([1.0, 2.0]), norm) == {"min": 0.0, "median": 0.0, "max": None}
    both = Norms({"out": norm}, {"out": norm})
    assert named(fits(torch.tensor([1.0, 2.0]), both)) == [{"axis": "out", "base": None, "changed": None}]


@pytest.mark.parametrize(
    ("near", "far", "count", "expected"),
    [
        (0.01, 0.3, 64, True),
        (0.01, 0.3, 3, False),  # three numbers come so near by chance
        (0.1, 0.19, 10_000, False),  # not twice as near
        (0.0, 0.3, 1, True),
        (0.0, 0.0, 64, False),
        (math.inf, math.inf, 64, False),
    ],
)
def test_what_is_clear(near: float, far: float, count: int, expected: bool) -> None:
    assert clear([Fit("out", near, near), Fit("in", far, far)], count) is expected


def test_a_square_that_fits_both_ways_is_an_error_with_both_numbers() -> None:
    """Random weights of one size: row and column norms are alike, and a drift of 10 % hides which was meant."""
    W = randn(256, 256, seed=0)
    found, _ = measured(W)
    with pytest.raises(AmbiguousError) as raised:
        axis_of(found.base["out"] * (1 + 0.1 * randn(256, seed=3).double()), found)
    text = str(raised.value)
    assert "256 DoRA magnitudes without an axis" in text and "one for each row, off ‖W‖ by 0.1" in text and "one for each column" in text
