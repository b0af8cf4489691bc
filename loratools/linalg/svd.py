"""Truncated SVD of a dense difference, as balanced factors that state their error and a lower bound of the best possible.

Block Krylov with a randomised certificate by default, a float64 Gram matrix where the short side is small or the certificate
does not close, LAPACK's whole SVD on request. Derivations: spec/certificate.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.errors import NonFiniteError, OptionError
from loratools.linalg._dense import gram, lapack
from loratools.linalg._iterative import block_size, iterative
from loratools.linalg._leading import Leading
from loratools.linalg._operator import Operator
from loratools.linalg._rules import Energy, Fixed, MaxError, RankRule, Rule, as_rule

__all__ = ["Energy", "Fixed", "MaxError", "RankRule", "Truncated", "truncated_svd"]

_SMALL = 512  # short sides up to this take the Gram route: tests/benchmarks/bench_svd.py --crossover
_BLOCK = 1 << 18  # elements of a row block while the error is measured


@dataclass(frozen=True, kw_only=True)
class Truncated:
    """D ≈ B @ A with B (m, r) and A (r, n), √σ on both sides, and what is known of its quality.

    sigma: the r singular values of the approximation, falling, float64 on the CPU; norm: ‖D‖_F; error: ‖D − BA‖_F measured with
    the factors as they are here; optimal: no matrix of rank r is nearer to D than this (with method "krylov" but for a chance
    below 1e-6 over the random start); passes: products of D or Dᵀ with a thin block.
    """

    B: Tensor
    A: Tensor
    sigma: Tensor
    norm: float
    error: float
    optimal: float
    method: str
    passes: int

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.B.shape[1]


def truncated_svd(
    D: Tensor,
    rank: RankRule,
    *,
    tolerance: float = 1e-4,
    exact: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    max_rank: int | None = None,
) -> Truncated:
    """The best approximation of D (m, n), float32 or float64, of a rank or under a rule, to `tolerance` of the best error.

    An int rank is kept: where D has a lower rank, the last factors are zero; it is cut to min(m, n) and max_rank. `dtype` is the
    factors' own, float32 by default. `exact` takes LAPACK's whole SVD in float64. The same seed and thread count give the same
    bits. Raises NonFiniteError for inf or nan in D, or in factors that overflow `dtype`; ConvergenceError if no rung of the
    exact ladder converges.

    >>> D = torch.outer(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0, 4.0]))
    >>> found = truncated_svd(D, 1)
    >>> found.rank, round(found.norm, 4), found.error < 1e-6
    (1, 11.1803, True)
    """
    op = Operator(D)
    if not 0 < tolerance < 1:
        raise OptionError("tolerance", found=tolerance, expected="between 0 and 1")
    rule = as_rule(rank, op.n if max_rank is None else min(op.n, max_rank))
    leading = _nothing(op) if op.norm == 0 else _route(op, rule, tolerance=tolerance, exact=exact, seed=seed)
    dtype = dtype or torch.float32
    found = _finish(op, leading, rule, dtype)
    if found.error > 1.00001 * leading.expected * op.unit + 2 * torch.finfo(dtype).eps * found.norm and leading.method == "krylov":
        found = _finish(op, gram(op, rule), rule, dtype)  # vectors that are not orthogonal hide from every sum of σ², not from the error
    return found


def _route(op: Operator, rule: Rule, *, tolerance: float, exact: bool, seed: int) -> Leading:
    if exact:
        return lapack(op, rule)
    small = op.n <= _SMALL or 6 * block_size(rule) > op.n or (isinstance(rule, Fixed) and 6 * rule.size > op.n)
    found = None if small or not op.plain else iterative(op, rule, tolerance=tolerance, seed=seed)
    return found or gram(op, rule)


def _nothing(op: Operator) -> Leading:
    empty = op.D.new_zeros(op.m, 0, dtype=torch.float64)
    return Leading(P=empty, sigma=torch.zeros(0, dtype=torch.float64), Q=empty[: op.n], optimal=0.0, expected=0.0, method="zero")


def _finish(op: Operator, leading: Leading, rule: Rule, dtype: torch.dtype) -> Truncated:
    """Cut or pad to the rank, balance, round to dtype, turn back to D's orientation, measure."""
    found = leading.sigma.numel()
    rank = rule.size if isinstance(rule, Fixed) else max(1, found)
    sigma = torch.zeros(rank, dtype=torch.float64)
    sigma[:found] = leading.sigma * op.unit
    root = sigma.sqrt().to(op.D.device)
    left, right = _padded(leading.P, rank) * root, _padded(leading.Q, rank) * root
    if op.transposed:
        left, right = right, left
    B, A = left.to(dtype).contiguous(), right.T.to(dtype).contiguous()
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise NonFiniteError(f"a factor overflows {dtype}")
    norm, error = op.norm * op.unit, _measured(op, B, A)
    optimal = min(leading.optimal * op.unit, error)  # both are good to about 1e-8: a bound above what was reached would only confuse
    return Truncated(B=B, A=A, sigma=sigma, norm=norm, error=error, optimal=optimal, method=leading.method, passes=op.passes)


def _padded(X: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(X, (0, rank - X.shape[1]))


def _measured(op: Operator, B: Tensor, A: Tensor) -> float:
    """‖D − BA‖_F from blocks of rows, squares summed in float64."""
    # Rounding the residual in float32 adds about (2u·‖D‖)² to its square, u = 2**-24: below 1e-10 of it while the error is
    # above 1 % of the norm. Below that, where squares may leave float32's range, and where products may be TF32: float64.
    if op.narrow and 2.0**-40 < op.unit < 2.0**40:
        error = _residual(op.D, B, A, torch.float32)
        if error > 0.01 * op.norm * op.unit:
            return error
    return _residual(op.D, B, A, torch.float64)


def _residual(D: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype) -> float:
    B, A = B.to(dtype), A.to(dtype)
    step = max(1, _BLOCK // max(1, D.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=D.device)
    buffer = torch.empty(min(step, D.shape[0]), D.shape[1], dtype=dtype, device=D.device)
    for start in range(0, D.shape[0], step):
        rows = buffer[: D.shape[0] - start].copy_(D[start : start + step])
        rows.addmm_(B[start : start + step], A, alpha=-1)
        total += torch.linalg.vector_norm(rows, dim=1).to(torch.float64).square().sum()
    return math.sqrt(float(total))
