"""Rotated: blocks along the diagonal, from the right and from the left, by plain algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.rotated import Rotated
from loratools.errors import NonFiniteError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["in", "out"]), seeds)
def test_algebra(count: int, size: int, other: int, side: str, seed: int) -> None:
    numbers, whole = randn(count, size * (size - 1) // 2, seed=seed), count * size
    W = randn(*((other, whole) if side == "in" else (whole, other)), seed=seed + 1)
    scale = randn(len(W), 1, seed=seed + 2)
    delta = Rotated(numbers=to_ref(numbers), side=side, scale=to_ref(scale))
    R = torch.block_diag(*delta.rotations())
    expected = scale.double() * (W.double() @ R if side == "in" else R @ W.double())
    assert torch.allclose(applied(delta, W), expected, rtol=1e-12, atol=1e-12)
    assert blocks_agree(delta, W)


@pytest.mark.parametrize("shape", [(6, 12), (6, 3, 2, 2), (6, 4, 3)])
def test_one_block_for_all_and_kernels(shape: tuple[int, ...]) -> None:
    W, delta = randn(*shape, seed=0), Rotated(numbers=to_ref(randn(1, 3, seed=1)), shared=True)
    R = torch.block_diag(*[delta.rotations()[0]] * 4)
    assert torch.allclose(applied(delta, W), (W.double().flatten(1) @ R).reshape(shape), rtol=1e-12, atol=1e-12)
    assert blocks_agree(delta, W) and delta.facts() == {"block": 3}


def test_float64_weights_keep_their_precision() -> None:
    numbers, W = randn(2, 15, seed=0), randn(9, 12, seed=1, dtype=torch.float64)
    delta = Rotated(numbers=to_ref(numbers))
    error = applied(delta, W) - W @ torch.block_diag(*delta.rotations())
    assert float(error.abs().max()) < 4e-16 * float(W.norm(dim=1).max()) * 4  # a few units in the last place of a row's norm


def test_what_it_does_not_fit() -> None:
    numbers = to_ref(torch.ones(2, 3))
    delta, rows = Rotated(numbers=numbers), Rotated(numbers=numbers, side="out", scale=to_ref(torch.ones(6, 1)))
    assert delta.fits(Spec("F32", (4, 6))) and delta.fits(Spec("F32", (4, 3, 1, 2))) and not delta.fits(Spec("F32", (6, 4)))
    assert rows.fits(Spec("F32", (6, 4))) and not rows.fits(Spec("F32", (4, 6)))
    with pytest.raises(ShapeError, match="turns other columns than the weight has: found 6, expected 5"):
        delta.spec(Spec("F32", (4, 5)))
    with pytest.raises(ShapeError, match=r"scales other rows than the weight has: found \[6, 1\], expected \[4, 1\]"):
        Rotated(numbers=numbers, scale=to_ref(torch.ones(6, 1))).spec(Spec("F32", (4, 6)))
    with pytest.raises(ShapeError, match="one block is shared by all"):
        Rotated(numbers=numbers, shared=True)
    assert not Rotated(numbers=to_ref(torch.ones(1, 3)), shared=True).fits(Spec("F32", (4, 7)))
    with pytest.raises(UnsupportedError):
        delta.spec(Spec("I32", (4, 6)))


def test_kernels_that_a_turned_input_cannot_have() -> None:
    delta = Rotated(numbers=to_ref(torch.ones(2, 3)), pointwise=True)
    assert delta.fits(Spec("F32", (4, 6, 1, 1))) and delta.fits(Spec("F32", (4, 6)))
    with pytest.raises(UnsupportedError, match=r"adds the patches up where they overlap.*found \[4, 2, 1, 3\].*serve it with peft"):
        delta.spec(Spec("F32", (4, 2, 1, 3)))


def test_a_weight_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="a weight holds inf or nan"):
        applied(Rotated(numbers=to_ref(torch.ones(1, 1))), torch.tensor([[1.0, float("inf")]]))
