"""VeRA: projections that are cut to the layer, by plain algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.vera import VeRA
from loratools.errors import ShapeError
from loratools.tensorfile import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def made(out: int, rank: int, seed: int, *, most: tuple[int, int] = (23, 19)) -> VeRA:
    tensors = {"B": randn(most[0], rank, seed=seed), "A": randn(rank, most[1], seed=seed + 1)}
    tensors |= {"b": randn(out, seed=seed + 2), "d": randn(rank, seed=seed + 3)}
    return VeRA(**{name: to_ref(tensor) for name, tensor in tensors.items()})


@given(st.integers(1, 23), st.integers(1, 19), st.integers(1, 5), seeds)
def test_algebra(out: int, width: int, rank: int, seed: int) -> None:
    W, b, d = randn(out, width, seed=seed + 9), randn(out, seed=seed + 2).double(), randn(rank, seed=seed + 3).double()
    B, A = randn(23, rank, seed=seed).double()[:out], randn(rank, 19, seed=seed + 1).double()[:, :width]
    assert torch.allclose(applied(made(out, rank, seed), W), W.double() + (b[:, None] * B) @ (d[:, None] * A), rtol=1e-12, atol=1e-12)


def test_any_blocks_give_the_same_bytes() -> None:
    assert blocks_agree(made(23, 4, 0), randn(23, 17, seed=5))


def test_its_product_is_that_of_the_fitted_weight() -> None:
    delta = made(7, 3, 0).fitted(Spec("F32", (7, 11)))
    B, A = delta.product()
    assert delta.shape() == (7, 11) == (B @ A).shape and delta.facts() == {"rank": 3}
    assert delta.norm() == pytest.approx(float((B @ A).norm()), rel=1e-9)


def test_what_does_not_meet() -> None:
    with pytest.raises(ShapeError, match="do not meet"):
        made(24, 3, 0)
    delta = made(7, 3, 0)
    assert delta.fits(Spec("F32", (7, 19))) and not delta.fits(Spec("F32", (7, 20))) and not delta.fits(Spec("F32", (8, 19)))
    with pytest.raises(ShapeError, match=r"found \[8, 19\], expected \[7, at most 19\]"):
        delta.spec(Spec("F32", (8, 19)))
