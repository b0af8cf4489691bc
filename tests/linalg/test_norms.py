"""Sums of squares: right, and the same bits for any blocking, stride and thread count."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.linalg.norms import ROWS, WIDTH, column_squares, column_sums, row_squares, row_sums
from tests.files import raw
from tests.strategies import randn, seeds


@given(st.integers(1, 300), st.integers(1, 400), st.integers(1, 300), seeds)
def test_rows_in_any_blocking(rows: int, columns: int, step: int, seed: int) -> None:
    X = randn(rows, columns, seed=seed).double()
    whole = row_squares(X)
    assert raw(whole) == raw(torch.cat([row_squares(X[start : start + step]) for start in range(0, rows, step)]))
    assert raw(whole) == raw(row_squares(X.T.contiguous().T))
    assert torch.allclose(whole, X.square().sum(1), rtol=1e-14, atol=0)  # 400 positive terms, summed pairwise


@given(st.integers(1, 600), st.integers(1, 40), seeds)
def test_columns_from_blocks_of_their_own_height(rows: int, columns: int, seed: int) -> None:
    X = randn(rows, columns, seed=seed).double()
    found = column_squares(X[start : start + ROWS] for start in range(0, rows, ROWS))
    assert torch.allclose(found, X.square().sum(0), rtol=1e-14, atol=0)
    one = torch.cat([column_squares(X[start : start + ROWS, j : j + 1] for start in range(0, rows, ROWS)) for j in range(columns)])
    assert raw(found) == raw(one)


def test_column_sums_keep_their_signs() -> None:
    X = randn(300, 7, seed=2).double()
    found = column_sums(X[start : start + ROWS] for start in range(0, 300, ROWS))
    assert torch.allclose(found, X.sum(0), rtol=0, atol=1e-13)  # 300 terms of about 1, each half a unit off
    blocks = [X[start : start + ROWS] for start in range(0, 300, ROWS)]
    assert raw(column_sums(block * block for block in blocks)) == raw(column_squares(blocks))


def test_against_exact_fractions() -> None:
    X = randn(2, 3 * WIDTH + 5, seed=0).double()
    for row, found in zip(X.tolist(), row_squares(X).tolist(), strict=True):
        exact = sum(Fraction(value) ** 2 for value in row)
        assert abs(Fraction(found) - exact) <= exact * 16 * 2**-53  # 3 + 7 additions and a product deep, each half a unit


def test_threads_do_not_change_a_bit() -> None:
    X, before = randn(500, 1000, seed=1).double(), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(raw(row_squares(X)) + raw(column_squares(X[start : start + ROWS] for start in range(0, 500, ROWS))))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_the_input_is_left_alone() -> None:
    X = randn(5, 7, seed=0).double()
    kept = X.clone()
    row_squares(X), column_squares([X])
    assert torch.equal(X, kept)


def test_empty() -> None:
    assert row_squares(torch.zeros(3, 0, dtype=torch.float64)).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no rows"):
        column_squares([])


@given(st.integers(1, 40), st.integers(1, 400), st.integers(1, 40), seeds)
def test_sums_of_rows_in_any_blocking(rows: int, columns: int, step: int, seed: int) -> None:
    X = randn(rows, columns, seed=seed).double()
    whole = row_sums(X)
    assert raw(whole) == raw(torch.cat([row_sums(X[start : start + step]) for start in range(0, rows, step)]))
    assert torch.allclose(whole, X.sum(1), rtol=0, atol=1e-14 * 400)  # of entries of about 1, half a unit each
