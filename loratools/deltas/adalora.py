"""AdaLoRA: ΔW = alpha/(r₀ + 10⁻⁵) · B·(E ∘ A), a product like an SVD's, from which training takes ranks off.

Zhang et al. 2023 (arXiv:2303.10512), section 3.1; peft 0.21.2 `tuners/adalora/layer.py`, where the divisor stays that of the first
rank r₀ and a convolution's A is flat.
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

EPSILON = 1e-5


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaLoRA(Product):
    """W′ = W + alpha/(first + 10⁻⁵)·B·(E ∘ A), A (r, in·kernel), B (out, r), E (r, 1); `first` is the rank that training began with.

    All ranks may be gone: then W′ = W. Raises ShapeError when the parts do not meet.
    """

    kind = "adalora"
    flat = True

    A: Ref
    B: Ref
    E: Ref
    alpha: float
    first: int

    def __post_init__(self) -> None:
        A, B, E = (ref.spec.shape for ref in (self.A, self.B, self.E))
        if len(A) != 2 or len(B) != 2 or [*E, B[1]] != [A[0], 1, A[0]]:
            found = f"A {list(A)}, B {list(B)}, E {list(E)}"
            raise ShapeError("the factors do not meet", found=found, expected="A [r, in], B [out, r], E [r, 1]")

    @property
    def rank(self) -> int:
        return self.A.spec.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / (self.first + EPSILON)

    def shape(self) -> tuple[int, ...]:
        return self.B.spec.shape[0], self.A.spec.shape[1]

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling}

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        A, B, E = (read_tensor(ref, torch.float64, device) for ref in (self.A, self.B, self.E))
        if not self.rank:
            return B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1])
        return B * self.scaling, A * E
