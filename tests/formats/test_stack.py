"""Matrices as one stack, and each of a stack alone: the same bytes, read by rows or whole."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import ShapeError
from loratools.formats._stack import Member, Stack
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_stacked_and_apart(dtype: torch.dtype) -> None:
    matrices = [randn(4, 3, seed=seed).to(dtype) for seed in range(3)]
    stack = Stack([to_ref(matrix) for matrix in matrices])
    assert torch.equal(read_tensor(stack), torch.stack(matrices))
    assert bytes(stack.rows(1, 3)) == b"".join(bytes(to_ref(matrix).read()) for matrix in matrices[1:])
    assert b"".join(bytes(block) for block in stack.blocks()) == bytes(stack.read())
    for number, matrix in enumerate(matrices):
        member = Member(stack, number)
        assert torch.equal(read_tensor(member), matrix) and torch.equal(read_tensor(member.T), matrix.T)
        assert bytes(member.rows(1, 3)) == bytes(to_ref(matrix[1:3].contiguous()).read())


def test_what_does_not_stack() -> None:
    with pytest.raises(ShapeError, match="factors of one stack that differ"):
        Stack([to_ref(randn(4, 3, seed=0)), to_ref(randn(4, 2, seed=1))])
