"""LoKr against torch.kron in float64: whole and low-rank factors, kernels, cores, exchanged indices; its exact product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.lokr import LoKr
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds

sizes = st.integers(1, 6)


def made(tensors: dict[str, Tensor], *, exchanged: bool = False) -> LoKr:
    return LoKr(**{name: to_ref(tensor) for name, tensor in tensors.items()}, scale=1.5, exchanged=exchanged)


def factor(name: str, out: int, width: int, rank: int | None, seed: int) -> dict[str, Tensor]:
    if rank is None:
        return {name: randn(out, width, seed=seed)}
    return {f"{name}_a": randn(out, rank, seed=seed), f"{name}_b": randn(rank, width, seed=seed + 1)}


def whole(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[name].double() if name in tensors else tensors[f"{name}_a"].double() @ tensors[f"{name}_b"].double()


@given(sizes, sizes, sizes, sizes, st.none() | st.integers(1, 3), st.none() | st.integers(1, 3), seeds)
def test_it_is_a_kronecker_product(a: int, b: int, c: int, d: int, one: int | None, other: int | None, seed: int) -> None:
    tensors = factor("w1", a, c, one, seed) | factor("w2", b, d, other, seed + 2)
    W, delta = randn(a * b, c * d, seed=seed + 9), made(tensors)
    expected = torch.kron(whole(tensors, "w1"), whole(tensors, "w2"))
    assert torch.allclose(applied(delta, W), W.double() + 1.5 * expected, rtol=1e-12, atol=1e-12)
    assert delta.rank == (one or other) and delta.norm() == pytest.approx(1.5 * float(expected.norm()), rel=1e-12)
    product = delta.product()
    if product is not None:
        assert product[1].shape[0] == (one or min(a, c)) * (other or min(b, d)) < min(W.shape)
        assert torch.allclose(product[0] @ product[1], 1.5 * expected, rtol=1e-12, atol=1e-12)


def test_a_product_of_full_rank_is_none() -> None:
    assert made({"w1": randn(2, 2, seed=0), "w2": randn(3, 3, seed=1)}).product() is None


def test_kernels_and_cores() -> None:
    W, w1 = randn(10, 6, 3, 2, seed=0), randn(2, 3, seed=1)
    w2 = randn(5, 2, 3, 2, seed=2)
    expected = torch.einsum("ac,bdkl->abcdkl", w1.double(), w2.double()).reshape(W.shape)
    assert torch.allclose(applied(made({"w1": w1, "w2": w2}), W), W.double() + 1.5 * expected, atol=1e-12)
    low = {"w1": w1, "w2_a": randn(5, 2, seed=3), "w2_b": randn(2, 12, seed=4)}
    w2 = whole(low, "w2").reshape(5, 2, 3, 2)
    expected = torch.einsum("ac,bdkl->abcdkl", w1.double(), w2).reshape(W.shape)
    assert torch.allclose(applied(made(low), W), W.double() + 1.5 * expected, atol=1e-12)
    core = {"w1": w1, "t2": randn(2, 2, 3, 2, seed=5), "w2_a": randn(2, 5, seed=6), "w2_b": randn(2, 2, seed=7)}
    w2 = torch.einsum("ijkl,ib,jd->bdkl", *(core[name].double() for name in ("t2", "w2_a", "w2_b")))
    expected = torch.einsum("ac,bdkl->abcdkl", w1.double(), w2).reshape(W.shape)
    delta = made(core)
    assert torch.allclose(applied(delta, W), W.double() + 1.5 * expected, atol=1e-12)
    B, A = delta.product() or (torch.zeros(0), torch.zeros(0))
    assert A.shape[0] == 4 and torch.allclose(B @ A, 1.5 * expected.flatten(1), atol=1e-12)


def test_exchanged_indices_are_pefts_conv1d() -> None:
    """torch.kron fills up the missing axis in front, which exchanges the factors; peft reshapes what comes of it."""
    W, w1, w2 = randn(12, 6, 3, seed=0), randn(2, 3, seed=1), randn(6, 2, 3, seed=2)
    expected = 1.5 * torch.kron(w1.double(), w2.double()).reshape(W.shape)
    delta = made({"w1": w1, "w2": w2}, exchanged=True)
    assert torch.allclose(applied(delta, W), W.double() + expected, atol=1e-12) and blocks_agree(delta, W)
    assert not torch.allclose(applied(made({"w1": w1, "w2": w2}), W), W.double() + expected, atol=1e-2)
    few = {"w1": randn(3, 1, seed=1), "w2": randn(6, 1, 30, seed=2)}
    B, A = made(few, exchanged=True).product() or (torch.zeros(0), torch.zeros(0))
    assert torch.allclose(B @ A, 1.5 * torch.kron(few["w1"].double(), few["w2"].double()).reshape(18, 30), atol=1e-12)
    with pytest.raises(ShapeError, match="only a whole w2 with a kernel"):
        made({"w1": w1, "w2": randn(6, 2, seed=2)}, exchanged=True)


def test_any_blocks_give_the_same_bytes() -> None:
    tensors = factor("w1", 3, 5, 2, 0) | factor("w2", 7, 4, 2, 2)
    assert blocks_agree(made(tensors), randn(21, 20, seed=5))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"w1_a": None}, "neither whole nor a product of two"),
        ({"w1": randn(3, 5, seed=0)}, "neither whole nor a product of two"),
        ({"w1_a": randn(3, 3, seed=0)}, r"w1_a \[3, 3\], w1_b \[2, 5\], expected \[out, r\] and"),
        ({"w2_b": randn(2, 4, 1, seed=0)}, "the factors do not meet"),
        ({"t2": randn(2, 3, 3, seed=0)}, r"t2 \[2, 3, 3\], expected \[r, out\], \[r, in\] and"),
        ({"w2_a": None, "w2_b": None, "w2": randn(7, seed=0)}, "w2 is no factor of a weight"),
        ({"w1_a": None, "w1_b": None, "w1": randn(3, 5, 1, seed=0)}, "w1 is no factor of a weight"),
    ],
)
def test_factors_that_do_not_meet(change: dict[str, Tensor | None], words: str) -> None:
    tensors = factor("w1", 3, 5, 2, 0) | factor("w2", 7, 4, 2, 2) | change
    with pytest.raises(ShapeError, match=words):
        made({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_weight_it_does_not_fit() -> None:
    delta = made(factor("w1", 3, 5, None, 0) | factor("w2", 7, 4, None, 2))
    assert delta.fits(Spec("F32", (21, 20))) and delta.fits(Spec("F32", (21, 5, 4))) and not delta.fits(Spec("F32", (20, 21)))
