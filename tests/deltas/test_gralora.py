"""GraLoRA block by block, with a hybrid and without; its exact product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.gralora import GraLoRA
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def parts(k: int, out: int, width: int, rank: int, hybrid: int, seed: int) -> dict[str, Tensor]:
    found = {"A": randn(k, width, rank, seed=seed), "B": randn(k, rank, out, seed=seed + 1)}
    more = {"up": randn(k * out, hybrid, seed=seed + 2), "down": randn(hybrid, k * width, seed=seed + 3)}
    return found | (more if hybrid else {})


def made(tensors: dict[str, Tensor]) -> GraLoRA:
    return GraLoRA(**{name: to_ref(tensor) for name, tensor in tensors.items()}, alpha=3.0)


def dense(tensors: dict[str, Tensor]) -> Tensor:
    A, B = tensors["A"].double(), tensors["B"].double()
    k, _, rank = A.shape
    t = rank // k
    blocks = [[B[j, n * t : (n + 1) * t].T @ A[n, :, j * t : (j + 1) * t].T for n in range(k)] for j in range(k)]
    change = torch.cat([torch.cat(row, dim=1) for row in blocks])
    if "up" in tensors:
        change = change + tensors["up"].double() @ tensors["down"].double()
        rank += tensors["up"].shape[1]
    return 3.0 / rank * change


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 2), st.integers(0, 2), seeds)
def test_blocks_product_and_norm(k: int, out: int, width: int, share: int, hybrid: int, seed: int) -> None:
    tensors, W = parts(k, out, width, k * share, hybrid, seed), randn(k * out, k * width, seed=seed + 9)
    delta, change = made(tensors), dense(tensors)
    assert torch.allclose(applied(delta, W), W.double() + change, rtol=1e-12, atol=1e-12)
    assert delta.norm() == pytest.approx(float(change.norm()), rel=1e-7, abs=1e-9)
    assert delta.facts() == {"rank": k * share + hybrid, "alpha": 3.0, "scaling": 3.0 / (k * share + hybrid)}
    product = delta.product()
    assert (product is None) == (k * k * share + hybrid >= min(W.shape))
    if product is not None:
        assert torch.allclose(product[0] @ product[1], change, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hybrid", [0, 2])
def test_any_blocks_give_the_same_bytes(hybrid: int) -> None:
    assert blocks_agree(made(parts(3, 7, 11, 6, hybrid, 0)), randn(21, 33, seed=5))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"A": (2, 5, 3), "B": (2, 3, 4)}, "a multiple of k"),
        ({"A": (3, 5, 4)}, "blocks do not meet"),
        ({"B": (2, 6, 4)}, "blocks do not meet"),
        ({"B": (8, 4)}, "blocks do not meet"),
        ({"up": (8, 1)}, r"up \[8, 1\], down None"),
        ({"down": (1, 10)}, r"up None, down \[1, 10\]"),
        ({"up": (8, 1), "down": (2, 10)}, r"expected up \[8, h\], down \[h, 10\]"),
        ({"up": (8, 1), "down": (1, 9)}, "the hybrid's factors"),
    ],
)
def test_parts_that_do_not_meet(change: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        made(parts(2, 4, 5, 4, 0, 0) | {name: randn(*shape, seed=0) for name, shape in change.items()})


def test_a_weight_it_does_not_fit() -> None:
    delta = made(parts(2, 4, 5, 4, 1, 0))
    assert delta.fits(Spec("F32", (8, 10))) and not delta.fits(Spec("F32", (10, 8)))
