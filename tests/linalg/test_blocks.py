"""Small matrices side by side: products, inverses and transforms against torch's own, with the same bits for any threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.linalg import blocks
from loratools.linalg.exact import ExactProduct, ExactRight, from_left
from tests.strategies import randn, seeds


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 65, 130])
def test_inverses(size: int) -> None:
    X = torch.eye(size, dtype=torch.float64) + blocks.skew(randn(2, size * (size - 1) // 2, seed=size).double(), size)
    assert torch.allclose(blocks.inverted(X), torch.linalg.inv(X), rtol=0, atol=1e-13)


def test_large_rotations_stay_orthogonal() -> None:
    Q = blocks.skew(100 * randn(1, 64 * 63 // 2, seed=0).double(), 64)
    R = blocks.cayley(Q)
    # Newton's step leaves the inverse's condition, about ‖Q‖ = 1.5e3, times a unit in the last place
    assert torch.allclose(R @ R.transpose(1, 2), torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-11)


def test_the_series_sums_up_to_the_transform() -> None:
    Q = blocks.skew(0.05 * randn(3, 10, seed=0).double(), 5)
    assert torch.allclose(blocks.series(Q, 40), blocks.cayley(Q), rtol=0, atol=1e-12)
    assert torch.equal(blocks.series(Q, 0), torch.eye(5, dtype=torch.float64).repeat(3, 1, 1))


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 40), st.integers(1, 9), seeds)
def test_products_side_by_side_are_those_one_by_one(count: int, rows: int, inner: int, columns: int, seed: int) -> None:
    X, A = randn(count, rows, inner, seed=seed).double(), randn(count, inner, columns, seed=seed + 1).double()
    found = ExactRight(A)(X)
    assert torch.equal(found, torch.stack([ExactRight(A[number])(X[number]) for number in range(count)]))


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 9), st.integers(1, 8), seeds)
def test_a_product_of_blocks_of_rows(rank: int, rows: int, columns: int, step: int, seed: int) -> None:
    B, X = randn(rank, rows, seed=seed).double(), randn(rows, columns, seed=seed + 1).double()
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    found = from_left(B, ((part, X[part]) for part in parts))
    assert torch.allclose(found, B @ X, rtol=1e-12, atol=1e-12)
    first, *others = (ExactProduct(B[:, part], X[part]).rows(0, rank) for part in parts)
    assert torch.equal(found, sum(others, first))


def test_a_product_of_no_rows() -> None:
    from loratools.errors import OptionError

    with pytest.raises(OptionError, match="a product with no rows"):
        from_left(torch.ones(2, 0), [])
