"""Small square matrices side by side, (count, b, b) in float64: skew ones, their Cayley transforms, with the same bits anywhere.

Products are exact (`linalg.exact`), all else is elementwise in a fixed order, so neither threads nor the processor matter. A library's
solver promises neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.linalg.exact import ExactRight
from loratools.linalg.norms import row_squares, row_sums

_LEAF = 32  # matrices up to this are inverted column by column, larger ones by quarters


def multiplied(X: Tensor, Y: Tensor) -> Tensor:
    """X @ Y."""
    return ExactRight(Y, slices=3)(X)


def skew(upper: Tensor, size: int) -> Tensor:
    """The skew-symmetric matrices with these numbers, (count, size·(size − 1)/2), above their diagonals, row by row.

    >>> skew(torch.tensor([[1.0]]), 2).tolist()
    [[[0.0, 1.0], [-1.0, 0.0]]]
    """
    Q = upper.new_zeros(len(upper), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[:, rows, columns] = upper
    return Q - Q.transpose(1, 2)


def bounded(Q: Tensor, bound: float, *, together: bool = False, floor: float = 0.0) -> Tensor:
    """Q scaled down to a Frobenius norm of at most `bound`, each matrix by itself or all as one; `floor` is added to a norm."""
    norms = row_squares(Q.flatten(1))
    norms = (row_sums(norms.reshape(1, -1)) if together else norms).sqrt().add_(floor).reshape(-1, 1, 1)
    return torch.where(norms > bound, Q * (bound / norms), Q)


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ of skew-symmetric Q, which is orthogonal: 2(I − Q)⁻¹ − I."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return 2 * inverted(eye - Q) - eye


def series(Q: Tensor, degree: int, last: float = 2.0) -> Tensor:
    """I + 2Q + 2Q² + … + last·Q^degree, the first terms of what `cayley` is the sum of."""
    total = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).repeat(len(Q), 1, 1)
    power = Q
    for number in range(1, degree + 1):
        power = power if number == 1 else multiplied(power, Q)
        total += power * (last if number == degree else 2.0)
    return total


def inverted(X: Tensor) -> Tensor:
    """X⁻¹ of matrices whose symmetric part is positive definite, such as I ± Q: no pivots are sought.

    One step of Newton's iteration takes off what large elements of Q cost in the elimination.
    """
    first = _inverted(X)
    return first + (first - multiplied(multiplied(first, X), first))


def _inverted(X: Tensor) -> Tensor:
    size = X.shape[-1]
    if size <= _LEAF:
        return _eliminated(X)
    half = size // 2
    (P, Q), (R, S) = ((rows[..., :half], rows[..., half:]) for rows in (X[:, :half], X[:, half:]))
    p = _inverted(P)
    left, right = multiplied(R, p), multiplied(p, Q)
    s = _inverted(S - multiplied(left, Q))
    upper = -multiplied(right, s)
    above, below = torch.cat([p - multiplied(upper, left), upper], -1), torch.cat([-multiplied(s, left), s], -1)
    return torch.cat([above, below], 1)


def _eliminated(X: Tensor) -> Tensor:
    size = X.shape[-1]
    work = torch.cat([X, torch.eye(size, dtype=X.dtype, device=X.device).expand_as(X)], -1)
    for step in range(size):
        row = work[:, step] / work[:, step, step, None]
        column = work[:, :, step].clone()
        column[:, step] = 0
        work -= column.unsqueeze(2) * row.unsqueeze(1)
        work[:, step] = row
    return work[..., size:]
