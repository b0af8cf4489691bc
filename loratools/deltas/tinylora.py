"""TinyLoRA: ΔW = B·R·A with R = Σᵢ vᵢ·Pᵢ, frozen singular vectors of the weight, random P, and a short vector that is trained.

arXiv:2602.04118, section 3; peft 0.21.2 `tuners/tinylora/layer.py`. B and A, which share the singular values, are in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Product
from loratools.deltas.seeded import normal
from loratools.errors import ShapeError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class TinyLoRA(Product):
    """W′ = W + B·(Σᵢ vᵢ·Pᵢ)·A, B (out, r), P (u, r, r), v (u), A (r, in); a `seed` stands for P where the file lacks it.

    Raises ShapeError when they do not meet.
    """

    kind = "tinylora"

    A: Ref
    B: Ref
    v: Ref
    P: Ref | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        A, B, v = (ref.spec.shape for ref in (self.A, self.B, self.v))
        good = [len(A), len(B), len(v)] == [2, 2, 1] and A[0] == B[1]
        P = None if self.P is None else self.P.spec.shape
        if not good or P not in (None, (*v, A[0], A[0])):
            found = f"A {list(A)}, B {list(B)}, v {list(v)}" + ("" if P is None else f", P {list(P)}")
            expected = "A [r, in], B [out, r], v [u], P [u, r, r]"
            raise ShapeError("the factors, projections and vector do not meet", found=found, expected=expected)

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return self.P is not None

    def shape(self) -> tuple[int, ...]:
        return self.B.spec.shape[0], self.A.spec.shape[1]

    def facts(self) -> dict[str, Any]:
        return {"rank": self.A.spec.shape[0]}

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        from loratools.linalg.exact import ExactProduct

        A, B, v = (read_tensor(ref, torch.float64, device) for ref in (self.A, self.B, self.v))
        R = torch.zeros(len(A), len(A), dtype=torch.float64, device=device)
        for weight, part in zip(v, self._projections(device), strict=True):
            R += weight * part
        return ExactProduct(B, R, slices=3).rows(0, len(B)), A

    def _projections(self, device: str) -> Tensor:
        import torch

        if self.P is not None:
            return read_tensor(self.P, torch.float64, device)
        assert self.seed is not None
        return normal(self.seed, self.v.spec.numel, self.A.spec.shape[0]).to(device, torch.float64)
