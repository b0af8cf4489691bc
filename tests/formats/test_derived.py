"""Tensors made of others: elements moved about and joined, by torch's own functions."""

from __future__ import annotations

import pytest
import torch

from loratools.formats._derived import Joined, repeated, rows_apart, spread_blocks
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


@DTYPES
def test_blocks_of_rows_in_columns_of_their_own(dtype: torch.dtype) -> None:
    X = randn(6, 4, seed=1).to(dtype)
    for count in (1, 2, 3, 6):
        assert torch.equal(read_tensor(spread_blocks(to_ref(X), count)), torch.block_diag(*X.chunk(count)))


@DTYPES
def test_rows_of_slots_that_are_on(dtype: torch.dtype) -> None:
    X = randn(6, 4, seed=1).to(dtype)
    found = read_tensor(rows_apart(to_ref(X), (False, True, False, True)))
    assert torch.equal(found, torch.cat([torch.zeros(3, 4), X[:3], torch.zeros(3, 4), X[3:]]).to(dtype))


@DTYPES
def test_columns_side_by_side(dtype: torch.dtype) -> None:
    X = randn(3, 4, seed=1).to(dtype)
    assert torch.equal(read_tensor(repeated(to_ref(X), 3)), X.repeat_interleave(3, dim=1))


@pytest.mark.parametrize(
    ("one", "other", "made"),
    [
        (torch.float32, torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
    ],
)  # fmt: skip
def test_joined_in_a_dtype_that_holds_both(one: torch.dtype, other: torch.dtype, made: torch.dtype) -> None:
    X, Y = randn(3, 4, seed=1).to(one), randn(3, 2, seed=2).to(other)
    wide = Joined((to_ref(X), to_ref(Y)), 1, negated=(False, True))
    assert wide.spec.shape == (3, 6) and torch.equal(read_tensor(wide), torch.cat([X.to(made), -Y.to(made)], dim=1))
    tall = Joined((to_ref(X.T.contiguous()), to_ref(Y.T.contiguous())), 0, negated=(False, False))
    assert tall.spec.shape == (6, 3) and bytes(tall.rows(2, 5)) == bytes(tall.read())[2 * 3 * made.itemsize : 5 * 3 * made.itemsize]


def test_negation_turns_every_sign() -> None:
    X = torch.tensor([[0.0, -0.0, float("inf")]])
    found = read_tensor(Joined((to_ref(X),), 0, negated=(True,)))
    assert torch.equal(found, -X) and torch.signbit(found).tolist() == [[True, False, True]]
