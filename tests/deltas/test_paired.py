"""Paired: rotations in two dimensions, written out element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.paired import Paired
from loratools.errors import OptionError, ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def number(row: int, group: int, variant: int, second: bool) -> int:
    """Which number is a row's: of its pair, of the row, or of the row among those of its kind in its group."""
    block, within = divmod(row, group)
    if variant == 1:
        return block * group // 2 + within % (group // 2)
    return row if variant == 2 else block * 2 * group + second * group + within


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 2, 4]), seeds)
def test_algebra(groups: int, half: int, columns: int, variant: int, seed: int) -> None:
    group, rows = 2 * half, groups * 2 * half
    theta, alpha = (randn(rows * variant // 2, seed=seed + i) for i in (0, 1))
    W, expected = randn(rows, columns, seed=seed + 2), torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        first = row % group < half
        c, s = number(row, group, variant, False), number(row, group, variant, True)
        other = W[row + half].double() * -1 if first else W[row - half].double()
        expected[row] = float(alpha[c]) * math.cos(theta[c]) * W[row].double() + float(alpha[s]) * math.sin(theta[s]) * other
    delta = Paired(theta=to_ref(theta), alpha=to_ref(alpha), variant=variant, group=group)
    assert torch.allclose(applied(delta, W), expected, rtol=1e-13, atol=1e-13)
    assert blocks_agree(delta, W)


def test_a_right_angle_exchanges_rows_of_a_bias() -> None:
    delta = Paired(theta=to_ref(torch.tensor([math.pi / 2])), alpha=to_ref(torch.tensor([2.0])), variant=1, group=2)
    assert applied(delta, torch.tensor([3.0, 5.0])).tolist() == pytest.approx([-10.0, 6.0], abs=1e-6)  # π/2 is a float32


def test_what_does_not_meet_or_fit() -> None:
    with pytest.raises(OptionError, match="variant"):
        Paired(theta=to_ref(torch.ones(2)), alpha=to_ref(torch.ones(2)), variant=3, group=2)
    for sizes, group in (((2, 3), 4), ((3, 3), 4), ((2, 2), 3), ((2, 2), 0)):
        with pytest.raises(ShapeError, match="angles and scales do not meet"):
            Paired(theta=to_ref(torch.ones(sizes[0])), alpha=to_ref(torch.ones(sizes[1])), variant=1, group=group)
    delta = Paired(theta=to_ref(torch.ones(4)), alpha=to_ref(torch.ones(4)), variant=2, group=2)
    assert delta.fits(Spec("F32", (4, 9))) and delta.fits(Spec("F32", (4,))) and not delta.fits(Spec("F32", (9, 4)))
    with pytest.raises(ShapeError, match="pairs other rows than the weight has: found 4, expected 9"):
        delta.spec(Spec("F32", (9, 4)))
