"""DeLoRA: ΔW = B·diag(λ/(r·‖Aᵢ‖·‖Bⁱ‖))·A ∘ w, a sum of normalized ranks whose strength λ is learned apart from their directions.

Bini et al. 2025 (arXiv:2503.18225), section 3; peft 0.21.2 `tuners/delora/layer.py`, where w, the norms of the base's columns, is
saved and a norm is taken to be at least 10⁻⁴.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Product
from loratools.errors import ShapeError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-4


@dataclass(frozen=True, eq=False, kw_only=True)
class DeLoRA(Product):
    """W′ = W + (B ∘ s)·(A ∘ w) with sᵢ = λ/(r·‖A[i]‖·‖B[:, i]‖), A (r, in), B (out, r), λ (1), w (in).

    Raises ShapeError when the parts do not meet.
    """

    kind = "delora"

    A: Ref
    B: Ref
    strength: Ref
    w_norm: Ref

    def __post_init__(self) -> None:
        A, B, strength, w = (ref.spec.shape for ref in (self.A, self.B, self.strength, self.w_norm))
        if len(A) != 2 or not A[0] or len(B) != 2 or B[1] != A[0] or strength != (1,) or w != (A[1],):
            found = f"A {list(A)}, B {list(B)}, lambda {list(strength)}, w_norm {list(w)}"
            raise ShapeError("the parts do not meet", found=found, expected="A [r, in], B [out, r], lambda [1], w_norm [in]")

    def shape(self) -> tuple[int, ...]:
        return self.B.spec.shape[0], self.A.spec.shape[1]

    def facts(self) -> dict[str, Any]:
        return {"rank": self.A.spec.shape[0]}

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        from loratools.linalg.norms import row_squares

        A, B, strength, w = (read_tensor(ref, torch.float64, device) for ref in (self.A, self.B, self.strength, self.w_norm))
        norms = [row_squares(X.contiguous()).sqrt_().clamp_(min=LEAST) for X in (A, B.T)]
        return B * (strength / A.shape[0] / (norms[0] * norms[1])), A * w
