"""VeRA: ΔW = (b ∘ B)·(d ∘ A), frozen random matrices that all layers share, and two vectors that are trained.

Kopiczko et al. 2024 (arXiv:2310.11454), section 3.1; peft 0.21.2 `tuners/vera/layer.py`, which lets layers of different sizes use
the first rows of B and the first columns of A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Product, require_floating
from loratools.errors import ShapeError
from loratools.tensorfile import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class VeRA(Product):
    """W′ = W + (b ∘ B[:out])·(d ∘ A[:, :in]), b (out), d (r), A (r, widest in), B (most out, r).

    `width` is the weight's own in, filled in once a base is met. Raises ShapeError when the parts do not meet.
    """

    kind = "vera"

    A: Ref
    B: Ref
    b: Ref
    d: Ref
    width: int | None = None

    def __post_init__(self) -> None:
        A, B, b, d = (ref.spec.shape for ref in (self.A, self.B, self.b, self.d))
        if [len(A), len(B), len(b), len(d)] != [2, 2, 1, 1] or (A[0], B[1]) != (*d, *d) or B[0] < b[0]:
            found = f"A {list(A)}, B {list(B)}, b {list(b)}, d {list(d)}"
            raise ShapeError("the projections and vectors do not meet", found=found, expected="A [r, in], B [out, r], b [out], d [r]")

    def shape(self) -> tuple[int, ...]:
        return self.b.spec.numel, self.width or self.A.spec.shape[1]

    def facts(self) -> dict[str, Any]:
        return {"rank": self.d.spec.numel}

    def spec(self, base: Spec | None) -> Spec:
        if base is None or self.width is not None:
            return super().spec(base)
        (out, most), found = self.shape(), base.shape
        if len(found) != 2 or found[0] != out or found[1] > most:
            raise ShapeError("does not fit the base's weight", found=list(found), expected=f"[{out}, at most {most}]")
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def fitted(self, base: Spec) -> Self:
        return replace(self, width=base.shape[1])

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        out, width = self.shape()
        b, d = (read_tensor(ref, torch.float64, device).reshape(-1, 1) for ref in (self.b, self.d))
        A, B = read_tensor(self.A, torch.float64, device)[:, :width], read_tensor(self.B, torch.float64, device)[:out]
        return b * B, d * A
