"""Butterfly: factors that mix nearer and farther neighbours, by dense permutation matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.butterfly import Butterfly
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def dealt(count: int, size: int, factor: int, halves: bool) -> Tensor:
    """G as a matrix: of each 2^factor·size neighbours the first and second half dealt out in turn, by half blocks or one by one."""
    grain, chunk = size // 2 if halves else 1, 2**factor * size
    G = torch.zeros(count, count, dtype=torch.float64)
    for start in range(0, count, chunk):
        for place in range(chunk // 2):
            pile, within = divmod(place, grain)
            for half in (0, 1):
                G[start + (2 * pile + half) * grain + within, start + half * chunk // 2 + place] = 1
    return G


@given(st.integers(1, 3), st.integers(1, 2), st.sampled_from([2, 4]), st.booleans(), st.sampled_from(["in", "out"]), seeds)
def test_algebra(factors: int, times: int, size: int, halves: bool, side: str, seed: int) -> None:
    blocks = times * 2 ** (factors - 1)
    numbers, whole = randn(factors, blocks, size, size, seed=seed), blocks * size
    W = randn(*((5, whole) if side == "in" else (whole, 5)), seed=seed + 1)
    delta = Butterfly(numbers=to_ref(numbers), side=side, halves=halves)
    R, expected = delta.rotations().reshape(numbers.shape), W.double()
    for factor in range(factors):
        G = dealt(whole, size, factor, halves)
        F = G.T @ torch.block_diag(*R[factor]) @ G
        expected = expected @ F if side == "in" else F @ expected
    assert torch.allclose(applied(delta, W), expected, rtol=1e-12, atol=1e-12)
    assert blocks_agree(delta, W)


def test_one_factor_may_have_blocks_of_odd_size_and_scales_rows() -> None:
    numbers, W, scale = randn(1, 3, 3, 3, seed=0), randn(4, 9, seed=1), randn(1, 4, seed=2)
    delta = Butterfly(numbers=to_ref(numbers), scale=to_ref(scale))
    expected = scale.double().T * (W.double() @ torch.block_diag(*delta.rotations()))
    assert torch.allclose(applied(delta, W), expected, rtol=1e-12, atol=1e-12)
    assert delta.align == 1 and delta.facts() == {"block": 3}


def test_how_many_rows_it_sees_together() -> None:
    assert Butterfly(numbers=to_ref(torch.ones(3, 8, 2, 2)), side="out").align == 8


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 3, 2, 2), (2, 2, 3, 3), (3, 2, 4, 4), (1, 0, 2, 2)])
def test_numbers_that_are_no_butterfly(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"no factors of a butterfly|makes no square blocks"):
        Butterfly(numbers=to_ref(torch.ones(shape)))


def test_what_it_does_not_fit() -> None:
    delta = Butterfly(numbers=to_ref(torch.ones(2, 2, 4, 4)))
    assert delta.fits(Spec("F32", (5, 8))) and delta.fits(Spec("F32", (5, 2, 2, 2))) and not delta.fits(Spec("F32", (8, 5)))
    with pytest.raises(ShapeError, match="turns other columns than the weight has: found 8, expected 9"):
        delta.spec(Spec("F32", (5, 9)))
