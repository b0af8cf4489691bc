"""LoHa against plain float64 algebra: matrices, convolutions told flat, convolutions with a core; its exact product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.loha import LoHa
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


def made(tensors: dict[str, Tensor], scale: float = 1.5) -> LoHa:
    return LoHa(**{name: to_ref(tensor) for name, tensor in tensors.items()}, scale=scale)


def plain(out: int, width: int, rank: int, seed: int) -> dict[str, Tensor]:
    shapes = ((out, rank), (rank, width)) * 2
    return {name: randn(*shape, seed=seed + i) for i, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))}


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), seeds)
def test_matrices(out: int, width: int, rank: int, seed: int) -> None:
    tensors, W = plain(out, width, rank, seed), randn(out, width, seed=seed + 9)
    w = {name: tensor.double() for name, tensor in tensors.items()}
    expected = W.double() + 1.5 * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
    assert torch.allclose(applied(made(tensors), W), expected, rtol=1e-12, atol=1e-12)


def test_a_convolution_told_flat_and_one_with_a_core() -> None:
    W = randn(5, 3, 2, 4, seed=1)
    flat = plain(5, 3 * 8, 2, 0)
    w = {name: tensor.double() for name, tensor in flat.items()}
    change = ((w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])).reshape(W.shape)
    assert torch.allclose(applied(made(flat, 1.0), W), W.double() + change, atol=1e-12)
    cored = {"w1_a": randn(2, 5, seed=3), "w1_b": randn(2, 3, seed=4), "w2_a": randn(2, 5, seed=5), "w2_b": randn(2, 3, seed=6)}
    cores = {"t1": randn(2, 2, 2, 4, seed=7), "t2": randn(2, 2, 2, 4, seed=8)}
    one, other = (
        torch.einsum("ijkl,jr,ip->prkl", cores[f"t{i}"].double(), cored[f"w{i}_b"].double(), cored[f"w{i}_a"].double()) for i in (1, 2)
    )
    assert torch.allclose(applied(made(cored | cores, 1.0), W), W.double() + one * other, atol=1e-12)


def test_any_blocks_give_the_same_bytes() -> None:
    assert blocks_agree(made(plain(37, 29, 3, 0)), randn(37, 29, seed=5))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), seeds)
def test_its_product_is_exact_and_tells_the_norm(out: int, width: int, rank: int, seed: int) -> None:
    delta = made(plain(out, width, rank, seed))
    B, A = delta.product()
    change = applied(delta, torch.zeros(out, width))
    assert A.shape[0] == rank**2 and torch.allclose(B @ A, change, rtol=1e-12, atol=1e-12)
    assert delta.norm() == pytest.approx(float(change.norm()), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        {"w1_b": randn(3, 6, seed=0)}, {"w1_a": randn(4, 2, seed=0)}, {"w2_b": randn(2, 5, seed=0)}, {"w1_a": randn(5, 2, 1, seed=0)},
        {"t1": randn(2, 2, 3, 3, seed=0)}, {"t1": randn(3, 2, 3, 3, seed=0), "t2": randn(3, 2, 3, 3, seed=0)},
    ],
)  # fmt: skip
def test_factors_that_do_not_meet(change: dict[str, Tensor]) -> None:
    with pytest.raises(ShapeError):
        made(plain(5, 6, 2, 0) | change)


def test_a_weight_it_does_not_fit() -> None:
    delta = made(plain(5, 6, 2, 0))
    assert delta.fits(Spec("F32", (5, 6))) and delta.fits(Spec("F32", (5, 3, 2))) and not delta.fits(Spec("F32", (6, 5)))
