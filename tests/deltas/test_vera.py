"""VeRA: projections that are cut to the layer, by plain algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.seeded import Projections
from loratools.deltas.vera import PVeRA, VeRA
from loratools.errors import ShapeError
from loratools.refs import Spec
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


def test_a_mean_is_in_the_first_halves() -> None:
    B, A, b, d = randn(9, 3, seed=0), randn(6, 8, seed=1), randn(7, seed=2), randn(6, seed=3)
    delta = PVeRA(B=to_ref(B), A=to_ref(A), b=to_ref(b), d=to_ref(d))
    expected = (b[:, None] * B[:7]).double() @ (d[:3, None].double() * A[:3, :5])
    W = randn(7, 5, seed=4)
    assert torch.allclose(applied(delta, W), W.double() + expected, rtol=1e-6, atol=1e-6)  # b∘B is rounded here
    assert blocks_agree(delta, W) and delta.facts() == {"rank": 3} and delta.reproducible
    for wrong in ({"d": to_ref(randn(5, seed=3))}, {"A": to_ref(randn(3, 8, seed=1))}, {"B": to_ref(randn(9, 6, seed=0))}):
        with pytest.raises(ShapeError, match=r"expected A \[2·r, in\], B \[out, r\], b \[out\], d \[2·r\]"):
            PVeRA(**{**delta.refs(), **wrong})


def test_drawn_projections_promise_no_bits_to_other_machines() -> None:
    delta = VeRA(b=to_ref(randn(7, seed=2)), d=to_ref(randn(3, seed=3)), bank=Projections(seed=0, rank=3, out=9, width=8))
    fitted, W = delta.fitted(Spec("F32", (7, 5))), randn(7, 5, seed=4)
    A, B = Projections(seed=0, rank=3, out=9, width=8).tensors
    stored = VeRA(A=to_ref(A), B=to_ref(B), b=delta.b, d=delta.d)
    assert torch.equal(applied(fitted, W), applied(stored, W)) and blocks_agree(fitted, W)
    assert stored.reproducible and not fitted.reproducible and set(fitted.refs()) == {"b", "d"} and fitted.parameters == 10
