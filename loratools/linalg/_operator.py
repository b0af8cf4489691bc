"""A matrix seen tall and scaled by a power of two: products with it and its transpose, in passes that are counted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.errors import NonFiniteError, OptionError

_BLOCK = 1 << 18  # elements of a row block: 2 MiB in float64, which stays in cache between the two products


class Operator:
    """X = D or Dᵀ, whichever is tall, times a power of two that brings its largest entry to [1/2, 1).

    The scaling keeps squares of singular values inside float32's range; it is exact and applied to thin blocks only, so no
    second matrix is made. `norm` is ‖X‖_F from float64 sums, `unit` what one in X means in D.
    """

    def __init__(self, D: Tensor) -> None:
        if D.ndim != 2 or D.dtype not in (torch.float32, torch.float64):
            raise OptionError("matrix", found=f"{D.dtype} {tuple(D.shape)}", expected="2-D in float32 or float64")
        self.D = D
        self.X = D if D.shape[0] >= D.shape[1] else D.T
        self.m, self.n = self.X.shape
        self.passes = 0
        low, high = map(float, torch.aminmax(D)) if D.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError("the matrix holds inf or nan")
        self.unit = 2.0 ** max(-1000, math.frexp(max(-low, high))[1])
        self.norm = math.hypot(*(float(torch.linalg.vector_norm(block)) for block in self.blocks()))

    @property
    def narrow(self) -> bool:
        """Whether D is float32 and its products are: not where a global switch may turn them into TF32 or bf16."""
        return self.D.dtype == torch.float32 and self.D.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"

    def rounding(self, dtype: torch.dtype) -> float:
        """Taken as the error of a product in dtype, in the Frobenius norm, relative to its factors': √k·u (Higham and Mary, 2019)."""
        return math.sqrt(self.m) * (2.0**-24 if dtype == torch.float32 else 2.0**-53)

    @property
    def plain(self) -> bool:
        """Whether products in D's own dtype neither overflow nor vanish before they are scaled."""
        return 2.0**-90 < self.unit < 2.0**90

    @property
    def transposed(self) -> bool:
        """Whether X is Dᵀ."""
        return self.D.shape[0] < self.D.shape[1]

    def blocks(self) -> Iterator[Tensor]:
        """X in float64, scaled, a block of rows at a time; each is overwritten by the next."""
        step = max(1, _BLOCK // max(1, self.n))
        # One buffer, as fresh memory costs several times the conversion; laid out as D is, so that both sides are read in order.
        buffer = torch.empty(min(step, self.m) * self.n, dtype=torch.float64, device=self.D.device)
        for start in range(0, self.m, step):
            rows = self.X[start : start + step]
            block = buffer[: rows.numel()].view(rows.T.shape).T if self.transposed else buffer[: rows.numel()].view(rows.shape)
            yield block.copy_(rows).mul_(1 / self.unit)

    def forward(self, Q: Tensor) -> Tensor:
        """X @ Q in D's dtype."""
        self.passes += 1
        return (self.X @ Q).mul_(1 / self.unit)

    def back(self, Z: Tensor) -> Tensor:
        """Xᵀ @ Z in D's dtype."""
        self.passes += 1
        return (Z.T.contiguous() @ self.X).mul_(1 / self.unit).T

    def gram(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """X @ V and XᵀX @ V in float64, reading X once."""
        self.passes += 2
        # Thin factors lie transposed: products of long rows are even in speed over all widths, those of long columns are not.
        Vt = V.T.contiguous()
        Zt = torch.empty(V.shape[1], self.m, dtype=torch.float64, device=V.device)
        Wt = torch.zeros(V.shape[1], self.n, dtype=torch.float64, device=V.device)
        start = 0
        for block in self.blocks():
            columns = torch.mm(Vt, block.T)
            Wt.addmm_(columns, block)
            Zt[:, start : start + block.shape[0]] = columns
            start += block.shape[0]
        return Zt.T, Wt.T
