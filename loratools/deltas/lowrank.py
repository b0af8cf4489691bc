"""LowRank: ΔW = scaling · B·A, the LoRA of Hu et al. 2021 (arXiv:2106.09685, section 4.1).

`B` (out, rank) is a matrix always and `A` (rank, in, *kernel) carries the kernel: one formula for linear layers and
convolutions, where peft's `conv_nd` composition equals (B·A.flatten(1)).view(out, in, *kernel). Weights that are stored
transposed, and embeddings, are the same with the factors exchanged: (B·A)ᵀ = Aᵀ·Bᵀ.
scaling = alpha / rank, or alpha / √rank for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Additive, Dense
from loratools.errors import NonFiniteError, ShapeError
from loratools.refs import Ref, Spec
from loratools.tensorfile import file_of
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

LARGE = 1 << 20  # elements from which on the arithmetic of bfloat16 is chosen for speed
LAYERS = ("linear", "embedding", "conv", "transposed", "unknown")


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Additive):
    """W′ = W + scaling·B·A; `layer` says what the weight belongs to, `unknown` when the file did not.

    A (rank, in, *kernel), B (out, rank), of any floating dtypes. Raises ShapeError when they do not meet.
    """

    kind = "lora"
    reproducible = True
    factored = True

    A: Ref
    B: Ref
    alpha: float
    rslora: bool = False
    layer: str = "unknown"

    def __post_init__(self) -> None:
        a, b = self.A.spec.shape, self.B.spec.shape
        if len(a) < 2 or len(b) != 2 or a[0] != b[1]:
            remedy = "they are swapped" if len(a) == len(b) == 2 and a[1] == b[0] < min(a[0], b[1]) else None
            found, expected = f"A {list(a)}, B {list(b)}", "A [rank, in, ...], B [out, rank]"
            raise ShapeError("A and B do not meet", found=found, expected=expected, remedy=remedy)
        if a[0] == 0:
            raise ShapeError("rank 0", found=f"A {list(a)}, B {list(b)}", expected="a rank of at least 1")

    @property
    def rank(self) -> int:
        return self.A.spec.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    def shape(self) -> tuple[int, ...]:
        return (self.B.spec.shape[0], *self.A.spec.shape[1:])

    def factors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(B, A) in float64, A flattened to (rank, in·kernel)."""
        import torch

        B, A = (read_tensor(ref, torch.float64, device) for ref in (self.B, self.A))
        return B, A.flatten(1)

    def fitted(self, base: Spec) -> Self:
        layer = self.layer if self.layer not in ("linear", "conv") else "conv" if len(base.shape) > 2 else "linear"
        return replace(self, A=self.A.reshape(self.rank, *base.shape[1:]), layer=layer)

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        B, A = self.factors(device)
        return B * self.scaling, A

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling}

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        from loratools.linalg.exact import ExactProduct

        B, A = self.factors(device)
        try:
            product = ExactProduct(B, A, scale=self.scaling * scale, slices=self._slices(base))
        except NonFiniteError as error:
            raise error.at(file=file_of(self.A)) from None
        made: dict[int, tuple[Tensor, Tensor]] = {}

        def dense(part: slice) -> Tensor:
            count = part.stop - part.start
            if count not in made:
                made.clear()
                made[count] = B.new_empty(count, product.shape[1]), B.new_empty(count, product.shape[1])
            out, scratch = made[count]
            return product.rows(part.start, part.stop, out=out, scratch=scratch)

        return dense

    def _slices(self, base: Spec) -> int:
        """How many slices the dtype that is written can show; `base.dtype` is that dtype.

        One is within √r·2⁻²⁶ of the factors' norms: at rank 16 it turns at most 7 in 100 000 bfloat16 weights to their other
        neighbour, whatever the ratio of ΔW to W, and at rank 64, or in float16, more than one in 10 000. Weights of fewer than
        LARGE elements, where time is no matter and one wrong would be a share one sees, always have two.
        """
        if base.dtype == "F64":
            return 3
        return 1 if base.dtype == "BF16" and self.rank <= 16 and base.numel >= LARGE else 2

    def norm(self) -> float:
        from loratools.linalg.product import product_norm

        return product_norm(*self.factors(), scale=self.scaling)

    def transposed(self) -> Self:
        """The delta of Wᵀ: (B·A)ᵀ = Aᵀ·Bᵀ, the same bytes in another order."""
        if len(self.A.spec.shape) != 2:
            raise ShapeError("only a matrix can be transposed", found=list(self.A.spec.shape))
        return replace(self, A=self.B.T, B=self.A.T)
