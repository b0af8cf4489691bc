"""Orthonormal columns: LAPACK's own Q with its signs, and where nothing tells which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.linalg.orthogonal import Undecided, gram_schmidt, householder, lengths
from tests.strategies import randn, seeds


@given(st.integers(1, 60), st.integers(1, 8), seeds)
def test_householder_is_lapacks(rows: int, columns: int, seed: int) -> None:
    P = randn(rows, min(rows, columns), seed=seed).double()
    Q, R = torch.linalg.qr(P)
    assert torch.allclose(householder(P), Q, rtol=0, atol=1e-13 * float((R.norm() / R.diagonal().abs()).max()))


def test_columns_with_nothing_to_eliminate_keep_their_sign() -> None:
    for P in (torch.eye(4, 3), -torch.eye(3), torch.tensor([[2.0, 1.0], [0.0, -3.0], [0.0, 0.0]])):
        assert torch.equal(householder(P.double()), torch.linalg.qr(P.double())[0])


@given(st.integers(1, 40), st.integers(1, 6), seeds)
def test_gram_and_schmidt(rows: int, columns: int, seed: int) -> None:
    U = randn(rows, min(rows, columns), seed=seed).double()
    Q, R = torch.linalg.qr(U)
    found = gram_schmidt(U)
    assert torch.allclose(found, Q * R.diagonal().sign(), rtol=0, atol=1e-13 * float((R.norm() / R.diagonal().abs()).max()) ** 2)
    assert torch.allclose(lengths(found), torch.ones(found.shape[1], dtype=torch.float64), rtol=0, atol=1e-14)


def test_columns_that_depend_on_each_other() -> None:
    U = randn(6, 2, seed=0).double()
    dependent = torch.cat([U, U[:, :1] + 1e-7 * randn(6, 1, seed=1).double()], 1)
    for orthonormal in (gram_schmidt, householder):
        with pytest.raises(Undecided, match="column 2 is zero, or depends on those before it"):
            orthonormal(dependent)
        with pytest.raises(Undecided, match="column 0 is zero"):
            orthonormal(torch.zeros(3, 1, dtype=torch.float64))


def test_a_sign_that_float32_does_not_tell() -> None:
    P = torch.tensor([[1.0, 0.0], [0.0, 1e-8], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(Undecided, match="rounding decides the sign of column 1"):
        householder(P)
    assert torch.allclose(householder(P, signs=False).abs(), torch.tensor([[1.0, 0], [0, 1e-8], [0, 1]]).double(), rtol=0, atol=1e-15)
    first = torch.tensor([[1e-30], [1.0]], dtype=torch.float64)  # the first column's sign is the file's own
    assert torch.allclose(householder(first), torch.linalg.qr(first)[0], rtol=0, atol=1e-15)


def test_threads_do_not_matter() -> None:
    P, before = randn(5000, 12, seed=0).double(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = householder(P), gram_schmidt(P)
        torch.set_num_threads(2)
        assert torch.equal(one[0], householder(P)) and torch.equal(one[1], gram_schmidt(P))
    finally:
        torch.set_num_threads(before)
