"""A low-rank product through its small core: singular values, norms, and sums of products, never forming the matrix.

B = Q_b R_b and Aᵀ = Q_a R_a, so B @ A has the singular values of the small R_b R_aᵀ. Everything is float64: factors with A near
1e-2 and B near 1e-6 and a condition of 1e6 leave a float32 core with an error of 3e-3 in the last singular values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loratools.errors import NonFiniteError, OptionError
from loratools.linalg._powers import balanced


class Triple(NamedTuple):
    """U (m, k), S (k,) falling, Vh (k, n) in float64, k = min(m, n, r)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def product_svd(B: Tensor, A: Tensor, *, scale: float = 1.0) -> Triple:
    """The SVD of scale · B @ A for B (m, r), A (r, n) of any float dtype; r may exceed m or n.

    Raises OptionError for shapes that do not fit, NonFiniteError for inf or nan.

    >>> product_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]), scale=0.5).S.tolist()
    [5.0]
    """
    B, A = _checked(B, A)
    left, core_left = torch.linalg.qr(B)
    right, core_right = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(abs(scale) * (core_left @ core_right.T), full_matrices=False)
    return Triple(U=left @ U * (-1.0 if scale < 0 else 1.0), S=S, Vh=Vh @ right.T)


def product_norm(B: Tensor, A: Tensor, *, scale: float = 1.0) -> float:
    """‖scale · B @ A‖_F from the r × r Gram matrices in float64.

    Good to 1e-15 · (Σₖ‖bₖ‖‖aₖ‖)² in the square: where the components cancel to less than 1e-7 of their size, use `product_svd`.

    >>> product_norm(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0]]), scale=-0.5)
    5.0
    """
    B, A = _checked(B, A)
    return abs(scale) * math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


def sum_svd(terms: Sequence[tuple[Tensor, Tensor, float]]) -> Triple:
    """The SVD of Σ scaleᵢ · Bᵢ @ Aᵢ: the same core, over the concatenated factors.

    >>> one = torch.ones(2, 1)
    >>> round(sum_svd([(one, one.T, 1.0), (one, one.T, -1.0)]).S.max().item(), 12)
    0.0
    """
    if not terms:
        raise OptionError("a sum of products", found="no terms", expected="one or more")
    B = torch.cat([B.to(torch.float64) * scale for B, _, scale in terms], dim=1)
    A = torch.cat([A.to(torch.float64) for _, A, _ in terms], dim=0)
    return product_svd(B, A)


class Against(NamedTuple):
    """Of two matrices: their inner product ⟨X, Y⟩ and their distance ‖X − Y‖_F."""

    inner: float
    distance: float


def against(known: Triple, B: Tensor, A: Tensor, *, scale: float = 1.0) -> Against:
    """X = U·S·Vh, known by its SVD, beside Y = scale · B @ A: no m × n matrix, and no cancellation in the distance.

    B = U·P + E and A = Q·Vh + F split Y − X into four parts that are orthogonal to each other, U(scale·P·Q − S)Vh,
    scale·E·Q·Vh, scale·U·P·F and scale·E·F, whose squares add up. Good to about 1e-15 of Σₖ‖bₖ‖‖aₖ‖.

    >>> one = product_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]]))
    >>> found = against(one, torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]]), scale=0.5)
    >>> round(found.inner, 12), round(found.distance, 12)
    (50.0, 5.0)
    """
    B, A = _checked(B, A)
    P, Q = known.U.T @ B, A @ known.Vh.T
    E, F = B - known.U @ P, A - Q @ known.Vh
    core = scale * (P @ Q)
    inner = float(core.diagonal() @ known.S)
    # Products first and norms last: a norm by Gram matrices would keep what cancels in E·Q, P·F or E·F only to half of the digits.
    apart = torch.linalg.qr(E, mode="r")[1] @ torch.linalg.qr(F.T, mode="r")[1].T
    parts = core - torch.diag(known.S), scale * (E @ Q), scale * (P @ F), scale * apart
    return Against(inner, math.sqrt(sum(float(part.square().sum()) for part in parts)))


def effective_rank(S: Tensor) -> float:
    """exp(H(p)) with pᵢ = σᵢ²/Σσ²: how many equal singular values would spread the energy so widely; 0 for a zero matrix.

    The definition of Roy and Vetterli, "The effective rank", EUSIPCO 2007, but over the energies σ², the shares an error
    measures; theirs takes pᵢ = σᵢ/Σσ and is larger.

    >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
    2.0
    """
    energy = S.to(torch.float64).square()
    total = energy.sum()
    if float(total) == 0:
        return 0.0
    share = energy / total
    return float(torch.exp(torch.special.entr(share).sum()))


def _checked(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise OptionError("factors do not fit", found=f"B {tuple(B.shape)}, A {tuple(A.shape)}", expected="B (m, r), A (r, n)")
    B, A = B.to(torch.float64), A.to(torch.float64)
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise NonFiniteError("a factor holds inf or nan")
    return balanced(B, A)
