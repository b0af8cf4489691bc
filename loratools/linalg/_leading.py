"""The leading part of a matrix as every route hands it over: X ≈ P · diag(sigma) · Qᵀ, and how good it could have been."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.linalg._certificate import Space
from loratools.linalg._operator import Operator


@dataclass(frozen=True, kw_only=True)
class Leading:
    """P (m, r), sigma (r,) falling, Q (n, r) in float64, all in X's unit.

    optimal is a lower bound on the best rank-r error; expected what P, sigma, Q leave if they are as orthogonal as they should be.
    """

    P: Tensor
    sigma: Tensor
    Q: Tensor
    optimal: float
    expected: float
    method: str


def split(op: Operator, space: Space) -> tuple[Tensor, Tensor, Tensor]:
    """P, sigma, Q of UUᵀX with U = orth(XV), V the space's basis: half a Krylov step better than XVVᵀ, without a pass.

    Ritz vectors make XV orthogonal, so UᵀX is W's columns over √θ; a small SVD turns it into singular triples.
    """
    root = space.theta.sqrt()
    # Below 1e-8 of the norm a column of Z is off by 1e-8 of itself, and no longer orthogonal to the large ones.
    kept = int((root > 1e-8 * op.norm).sum())
    root = root[:kept].to(space.Z.device)
    base, R = torch.linalg.qr(space.W[:, :kept] / root)
    left, sigma, right = torch.linalg.svd(R.cpu(), full_matrices=False)  # (UᵀX)ᵀ = base · R
    return space.Z[:, :kept] / root @ right.T.to(root.device), sigma, base @ left.to(root.device)


def tail(total: float, sigma: Tensor, rank: int) -> float:
    """√(total − Σ of the first `rank` σ²): the error of the projection by Pythagoras; 0 where rounding makes it negative."""
    return math.sqrt(max(0.0, total - float(sigma[:rank].square().sum())))
