"""Intruder dimensions: singular directions of a changed weight that the weight before had nothing like, and where a change lies.

A left singular vector u′ⱼ of W′ is an intruder if max over i of |⟨u′ⱼ, uᵢ⟩| < ε, the uᵢ being those of W (Shuttleworth et al.
2024, "LoRA vs full fine-tuning: an illusion of equivalence", arXiv:2410.21228, section 3). The first top_k of them are looked at,
as in peft 0.21 (`tuners/lora/intruders.py`). W has min(m, n) left singular vectors: of a tall one they do not span everything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loratools.errors import ConvergenceError, NonFiniteError


class Found(NamedTuple):
    """Of one change: `cosines` (k,), the largest |cos| of each leading left singular vector of W′ with any of W's.

    left, right: the shares of ‖D‖² in the span of W's k leading left and right singular vectors, None of no change; norm is ‖D‖.
    """

    cosines: Tensor
    left: float | None
    right: float | None
    norm: float


class Directions:
    """The singular vectors of a weight W (m, n), from LAPACK's whole SVD in float64.

    Raises NonFiniteError for inf or nan, ConvergenceError where the SVD does not converge.

    >>> W = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> D = torch.zeros(3, 3)
    >>> D[2, 1] = 9.0
    >>> found = Directions(W).against(D, 2)
    >>> [round(cosine, 2) for cosine in found.cosines.tolist()], found.left, found.right
    ([0.98, 1.0], 0.0, 1.0)
    """

    def __init__(self, W: Tensor) -> None:
        self.W = W.to(torch.float64)
        self.U, _, self.Vh = _svd(self.W)

    def against(self, D: Tensor, top_k: int) -> Found:
        """W′ = W + D beside W, by its `top_k` leading directions, or as many as there are."""
        D = D.to(torch.float64)
        tuned = _svd(self.W + D)[0][:, :top_k]
        norm = float(torch.linalg.vector_norm(D))
        cosines = (tuned.T @ self.U).abs().amax(dim=1).clamp_max(1.0)
        if norm == 0:
            return Found(cosines, None, None, 0.0)
        left = float(torch.linalg.vector_norm(self.U[:, :top_k].T @ D)) / norm
        right = float(torch.linalg.vector_norm(D @ self.Vh[:top_k].T)) / norm
        return Found(cosines, min(1.0, left**2), min(1.0, right**2), norm)


def _svd(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not bool(torch.isfinite(X).all()):
        raise NonFiniteError("the weight holds inf or nan, or the changed one does")
    try:
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    except RuntimeError as error:  # torch's LinAlgError is one
        raise ConvergenceError("the singular value decomposition did not converge", found=str(error).splitlines()[0][:80]) from None
    return U, S, Vh
