"""Powers of two, exactly: the binary exponents of rows and columns, and factors balanced by them."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, in float64, with column k of B and row k of A alike in size: exact, as only exponents change.

    >>> B, A = balanced(torch.tensor([[8.0]], dtype=torch.float64), torch.tensor([[0.5]], dtype=torch.float64))
    >>> B.item(), A.item()
    (2.0, 2.0)
    """
    shift = (exponent(B, 0) - exponent(A, 1).T) // 2
    return B * power(-shift), A * power(shift.T)


def exponent(X: Tensor, axis: int) -> Tensor:
    """Per row (axis 1 or -1) or column (axis 0 or -2) the least e with |x| < 2**e, as int64 with the axis kept; 0 for zeros."""
    if not X.shape[axis]:
        return torch.zeros(tuple(1 if i == axis % X.ndim else size for i, size in enumerate(X.shape)), dtype=torch.int64, device=X.device)
    largest = torch.maximum(X.amax(axis, keepdim=True), -X.amin(axis, keepdim=True))  # no copy of |X|
    return torch.frexp(largest).exponent.to(torch.int64)


def power(exponent: Tensor) -> Tensor:
    """2.0**exponent, made from its bits: torch.ldexp goes through pow, which promises only to be close."""
    return (exponent.clamp(-1022, 1023) + 1023).bitwise_left_shift(52).view(torch.float64)
