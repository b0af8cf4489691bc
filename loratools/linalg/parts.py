"""A weight as the sum of its singular components, cut in two: what a float32 SVD of it elsewhere has split alike, and how surely."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.linalg.svd import truncated_svd

LIMIT = 2.0**-13  # of ‖W‖: a tenth of what storing W in bfloat16 costs


@dataclass(frozen=True)
class Parts:
    """W = Σ bᵢ·aᵢ with √σᵢ on both sides: B (m, k), A (k, n), sigma (k,) falling, all float64, k = min(m, n)."""

    B: Tensor
    A: Tensor
    sigma: Tensor

    def between(self, start: int, stop: int) -> Tensor:
        """The components from `start` to `stop`, largest first, as one matrix (m, n)."""
        return self.B[:, start:stop] @ self.A[start:stop]

    def doubt(self, cut: int) -> float:
        """How far, relative to ‖W‖, float32 may move the sum of the first `cut` components; 0 where they are all or none.

        Rounding of size u·σ₁, u = 2⁻²⁴, turns the components on both sides of the cut into each other by an angle of u·σ₁/gap
        (Wedin 1972), which moves their sums by √2·σ·angle; 4 times that covers LAPACK's driver on matrices of up to 1024 × 1024.
        """
        if not 0 < cut < len(self.sigma):
            return 0.0
        first, above, below = (float(self.sigma[index]) for index in (0, cut - 1, cut))
        gap, norm = above - below, float(torch.linalg.vector_norm(self.sigma))
        angle = min(1.0, 2.0**-24 * first / gap) if gap else 1.0
        return 4 * math.sqrt(2) * angle * above / norm if norm else 0.0


def parts(W: Tensor) -> Parts:
    """All singular components of a float64 matrix, by LAPACK. Raises NonFiniteError for inf or nan.

    >>> found = parts(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)))
    >>> found.sigma.tolist(), found.between(0, 2).diagonal().round(decimals=9).tolist()
    ([3.0, 2.0, 1.0], [3.0, 2.0, 0.0])
    """
    found = truncated_svd(W, min(W.shape), exact=True, dtype=torch.float64)
    return Parts(found.B, found.A, found.sigma)
