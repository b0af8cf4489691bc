"""GraLoRA: k × k blocks, each a low-rank product of its own.

Jung et al. 2025 (arXiv:2505.20355), section 3; peft 0.21.2 `tuners/gralora/layer.py`. A's n-th part sees the n-th part of the input, its
columns are dealt out to the k parts of the output; a hybrid adds an ordinary low-rank product under the same scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Additive, Dense, exact_rows
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class GraLoRA(Additive):
    """W′ = W + s·ΔW with ΔW's block (j, n) = B[j, n·t:(n + 1)·t]ᵀ · A[n, :, j·t:(j + 1)·t]ᵀ, t = r/k, s = alpha/(r + h).

    A (k, in/k, r), B (k, r, out/k); A hybrid's down (h, in) and up (out, h) add up·down. Raises ShapeError when the parts
    do not meet.
    """

    kind = "gralora"
    reproducible = True
    factored = True

    A: Ref
    B: Ref
    alpha: float
    up: Ref | None = None
    down: Ref | None = None

    def __post_init__(self) -> None:
        A, B = self.A.spec.shape, self.B.spec.shape
        if len(A) != 3 or len(B) != 3 or not self.A.spec.numel or A[0] != B[0] or A[2] != B[1] or A[2] % A[0]:
            found = f"A {list(A)}, B {list(B)}"
            raise ShapeError("the blocks do not meet", found=found, expected="A [k, in/k, r], B [k, r, out/k], r a multiple of k")
        (out, width), up, down = self.shape(), self.up and self.up.spec.shape, self.down and self.down.spec.shape
        if (up, down) != (None, None) and (not up or not down or len(down) != 2 or down[1] != width or up != (out, down[0])):
            found = f"up {up and list(up)}, down {down and list(down)}"
            raise ShapeError("the hybrid's factors do not meet", found=found, expected=f"up [{out}, h], down [h, {width}]")

    @property
    def rank(self) -> int:
        """r, and the hybrid's."""
        return self.A.spec.shape[2] + (self.down.spec.shape[0] if self.down else 0)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def shape(self) -> tuple[int, ...]:
        (k, width, _), out = self.A.spec.shape, self.B.spec.shape[2]
        return k * out, k * width

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling}

    def bands(self, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """For each of the k bands of rows its own (B, A), all scaling within: each row of A sees one part of the input."""
        import torch

        A, B = (read_tensor(ref, torch.float64, device) for ref in (self.A, self.B))
        k, width, rank = A.shape
        more = [read_tensor(ref, torch.float64, device) for ref in (self.up, self.down) if ref is not None]
        bands = []
        for j in range(k):
            right = A.new_zeros(k, rank // k, k, width)
            for n in range(k):
                right[n, :, n] = A[n, :, j * (rank // k) : (j + 1) * (rank // k)].T
            left, right = B[j].T, right.reshape(rank, k * width)
            if more:
                band = more[0][j * len(left) : (j + 1) * len(left)]
                left, right = torch.cat([left, band], dim=1), torch.cat([right, more[1]])
            bands.append((left * self.scaling, right))
        return bands

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        import torch

        height, parts = self.B.spec.shape[2], [exact_rows(B, A, base, scale) for B, A in self.bands(device)]

        def rows(part: slice) -> Tensor:
            found = []
            for j in range(part.start // height, -(-part.stop // height)):
                start = j * height
                found.append(parts[j](slice(max(part.start - start, 0), min(part.stop - start, height))))
            return found[0] if len(found) == 1 else torch.cat(found)

        return rows

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        """Of rank k·r, band beside band, and the hybrid's."""
        import torch

        (out, width), (k, _, rank) = self.shape(), self.A.spec.shape
        if (k - 1) * rank + self.rank >= min(out, width):
            return None
        bands = self.bands(device)
        B = bands[0][0].new_zeros(out, k * rank)
        for j, (left, _) in enumerate(bands):
            B[j * len(left) : (j + 1) * len(left), j * rank : (j + 1) * rank] = left[:, :rank]
        B = torch.cat([B, torch.cat([left[:, rank:] for left, _ in bands])], dim=1)
        return B, torch.cat([*(right[:rank] for _, right in bands), bands[0][1][rank:]])

    def norm(self) -> float:
        from loratools.linalg.product import product_norm

        return math.sqrt(math.fsum(product_norm(B, A) ** 2 for B, A in self.bands()))
