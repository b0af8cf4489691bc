"""Sums of squares that give the same bits in any blocking and on any number of threads.

A library's sum may take another order for another shape. Here each product and each addition is one elementwise operation
of its own, in an order the numbers of rows and columns fix alone: IEEE 754 then leaves nothing open.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

WIDTH = 128
ROWS = 128


def row_squares(X: Tensor) -> Tensor:
    """Σⱼ X[i, j]² for each row of an (m, n) float64 matrix, (m,).

    >>> import torch
    >>> row_squares(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    tensor([25.], dtype=torch.float64)
    """
    return row_sums(X * X)


def row_sums(X: Tensor) -> Tensor:
    """Σⱼ X[i, j] for each row of an (m, n) float64 matrix, (m,): of products, their dot product.

    >>> import torch
    >>> row_sums(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    tensor([6.], dtype=torch.float64)
    """
    rows, columns = X.shape
    whole = columns - columns % WIDTH
    folded = X.new_zeros(rows, WIDTH)
    for start in range(0, whole, WIDTH):
        folded += X[:, start : start + WIDTH]
    folded[:, : columns - whole] += X[:, whole:]
    return _halve(folded)


def column_squares(blocks: Iterable[Tensor]) -> Tensor:
    """Σᵢ X[i, j]² for each column, (n,), of a matrix that comes in blocks of ROWS rows (the last may be shorter)."""
    return column_sums(block * block for block in blocks)


def column_sums(blocks: Iterable[Tensor]) -> Tensor:
    """Σᵢ X[i, j] for each column, (n,), of a matrix that comes in blocks of ROWS rows (the last may be shorter)."""
    total: Tensor | None = None
    for block in blocks:
        padded = block.new_zeros(ROWS, block.shape[1])
        padded[: len(block)] = block
        folded = _halve(padded.T)
        total = folded if total is None else total + folded
    if total is None:
        raise ValueError("no rows")
    return total


def _halve(folded: Tensor) -> Tensor:
    """The sums over the last axis, whose size is a power of two, halved until one is left."""
    while folded.shape[1] > 1:
        half = folded.shape[1] // 2
        folded = folded[:, :half] + folded[:, half:]
    return folded[:, 0]
