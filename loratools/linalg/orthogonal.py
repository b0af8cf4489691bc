"""Orthonormal columns from given ones, by Gram and Schmidt and by Householder, with the same bits anywhere.

Sums run in a fixed order (`linalg.norms`), all else is elementwise. Columns that depend on each other, and signs that rounding decides,
have no result: `Undecided` says so rather than to return noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loratools.linalg.norms import row_sums

_DEPENDENT = 2.0**-18  # what is left of a column that float32, in which it was trained, cannot tell from nothing
_UNSURE = 2.0**-19  # of an entry's usual size: below it float32 does not tell the sign


class Undecided(ArithmeticError):
    """The columns have no orthonormal ones that float32 would tell; its text says why."""


def dots(X: Tensor, y: Tensor) -> Tensor:
    """Σᵢ X[i, j]·y[i] for each column of an (n, r) matrix, (r,)."""
    return row_sums((X * y.unsqueeze(1)).T.contiguous())


def lengths(X: Tensor) -> Tensor:
    """The norm of each column."""
    return row_sums((X * X).T.contiguous()).sqrt()


def gram_schmidt(U: Tensor) -> Tensor:
    """Orthonormal columns of the same spans: each less its parts along those before it, taken off one by one, over its norm."""
    before, columns = lengths(U), list[Tensor]()
    for number in range(U.shape[1]):
        column = U[:, number : number + 1]
        for done in columns:
            column = column - done * dots(column, done[:, 0])
        length = lengths(column)
        if bool(length <= _DEPENDENT * before[number]):
            raise Undecided(f"column {number} is zero, or depends on those before it")
        columns.append(column / length)
    return torch.cat(columns, 1)


def householder(P: Tensor, *, signs: bool = True) -> Tensor:
    """Q of P = QR, (n, r) with n ≥ r, its signs those of LAPACK's geqrf: an element of R's diagonal has the sign its column had not.

    Raises Undecided for columns that depend on each other and, where `signs` matter, for one whose sign float32 would not tell.
    """
    work, before = P.clone(), lengths(P)
    reflections = []
    for number in range(P.shape[1]):
        column = work[number:, number]
        first, length = float(column[0]), float(lengths(column.unsqueeze(1)))
        if length <= _DEPENDENT * float(before[number]):
            raise Undecided(f"column {number} is zero, or depends on those before it")
        if not bool(column[1:].any()):
            continue  # nothing to eliminate: LAPACK leaves the column, its sign and all
        if signs and number and abs(first) <= _UNSURE * float(before[number]) / math.sqrt(len(P)):
            raise Undecided(f"rounding decides the sign of column {number}")
        beta = -math.copysign(length, first)
        v = column / (first - beta)
        v[0] = 1
        reflections.append((number, v, (beta - first) / beta))
        _reflect(work[number:, number:], *reflections[-1][1:])
    Q = torch.eye(*P.shape, dtype=P.dtype, device=P.device)
    for number, v, tau in reversed(reflections):
        _reflect(Q[number:], v, tau)
    return Q


def _reflect(X: Tensor, v: Tensor, tau: float) -> None:
    X -= v.unsqueeze(1) * (dots(X, v) * tau)
