"""The SVD and norm of a product through its core, against the dense matrix and against spectra known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import NonFiniteError, OptionError
from loratools.linalg.product import against, effective_rank, product_norm, product_svd, sum_svd
from tests.linalg._spectra import orthonormal


@given(
    m=st.integers(1, 30), n=st.integers(1, 30), rank=st.integers(1, 40), scale=st.sampled_from([1, -2.5, 1e-3, 0]), seed=st.integers(0, 99)
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_against_the_dense_svd(m: int, n: int, rank: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    dense = scale * (B.double() @ A.double())
    U, S, Vh = product_svd(B, A, scale=scale)
    size, k = max(float(torch.linalg.matrix_norm(dense)), 1e-300), min(m, n, rank)
    assert U.shape == (m, k) and S.shape == (k,) and Vh.shape == (k, n)
    assert float((U * S @ Vh - dense).abs().max()) <= 1e-13 * size
    assert torch.allclose(S, torch.linalg.svdvals(dense)[:k], atol=1e-13 * size)
    for basis in (U, Vh.T):
        assert torch.allclose(basis.T @ basis, torch.eye(k, dtype=torch.float64), atol=1e-12)
    assert product_norm(B, A, scale=scale) == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-12)


@pytest.mark.parametrize(("size_a", "size_b"), [(1e-2, 1e-6), (1e-150, 1e100), (1e120, 1e-130)])
def test_small_singular_values_of_ill_conditioned_factors(size_a: float, size_b: float) -> None:
    # condition 1e6, known beforehand: float64 leaves 1e-16 · 1e6 of the smallest, a float32 core would leave it 1e-1 wrong
    generator = torch.Generator().manual_seed(0)
    left, right = orthonormal(300, 16, generator), orthonormal(200, 16, generator)
    root = torch.logspace(0, -3, 16, dtype=torch.float64)
    S = product_svd(left * root * size_b, (right * root).T * size_a).S
    assert torch.allclose(S / (size_a * size_b), root.square(), rtol=1e-9, atol=0)


def test_zero_factors_and_components() -> None:
    S = product_svd(torch.zeros(5, 3), torch.ones(3, 4)).S
    assert S.tolist() == [0.0] * 3 and product_norm(torch.zeros(5, 3), torch.ones(3, 4)) == 0.0
    B, A = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    assert product_svd(B, A).S.tolist() == [2.0, 0.0]


def test_sum_is_the_svd_of_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = [
        (torch.randn(20, r, generator=generator), torch.randn(r, 15, generator=generator), s) for r, s in ((3, 1.0), (5, -0.5), (1, 7.0))
    ]
    dense = sum(s * (B.double() @ A.double()) for B, A, s in terms)
    U, S, Vh = sum_svd(terms)
    assert torch.allclose(U * S @ Vh, dense, atol=1e-12)
    with pytest.raises(OptionError):
        sum_svd([])


@settings(max_examples=60)
@given(*[st.integers(1, 14)] * 4, st.integers(0, 2**16), st.sampled_from([1.0, -0.3, 1e-8]))
def test_against_is_the_dense_inner_product_and_distance(m: int, n: int, r: int, s: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, A, D, C = (torch.randn(shape, generator=generator) for shape in ((m, r), (r, n), (m, s), (s, n)))
    X, Y = B.double() @ A.double(), scale * D.double() @ C.double()
    noise = 1e-13 * (float(B.norm() * A.norm()) + abs(scale) * float(D.norm() * C.norm()))  # a few hundred units of float64
    found = against(product_svd(B, A), D, C, scale=scale)
    assert found.distance == pytest.approx(float((X - Y).norm()), abs=noise)
    assert found.inner == pytest.approx(float((X * Y).sum()), abs=noise * float(X.norm() + Y.norm()))
    # the same matrix by other factors, of any rank beside m and n: no digits are lost where everything cancels
    assert against(product_svd(B, A), 4 * B, A, scale=0.25).distance <= noise


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([5.0, 0.0])) == 1.0
    assert effective_rank(torch.zeros(3)) == 0.0
    half = 0.9 * math.log(1 / 0.9) + 0.1 * math.log(10)  # energies 0.9 and 0.1
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(half))


def test_faults() -> None:
    with pytest.raises(OptionError):
        product_svd(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(NonFiniteError):
        product_norm(torch.full((2, 3), float("nan")), torch.ones(3, 2))
