"""C3A: a matrix of circulant blocks, each told by one row.

Chen et al. 2024 (arXiv:2407.19342), section 3; peft 0.21.2 `tuners/c3a/utils.py`, which multiplies by fast Fourier transforms. Entry by
entry a block is ΔW[i, j] = kernel[(j − i) mod b] / in, which needs none and is exact but for the division.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from loratools.deltas.base import Additive, Dense
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class C3A(Additive):
    """W′ = W + C/in, C of blocks (m, n) with C[i, j] = kernel[m, n, (j − i) mod b], kernel (out/b, in/b, b).

    Raises ShapeError for a kernel that has not three axes.
    """

    kind = "c3a"
    reproducible = True
    factored = True

    kernel: Ref

    def __post_init__(self) -> None:
        if len(self.kernel.spec.shape) != 3 or not self.kernel.spec.numel:
            raise ShapeError("no rows of circulant blocks", found=list(self.kernel.spec.shape), expected="[out/b, in/b, b]")

    def shape(self) -> tuple[int, ...]:
        rows, columns, size = self.kernel.spec.shape
        return rows * size, columns * size

    def facts(self) -> dict[str, Any]:
        return {}

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        import torch

        size = self.kernel.spec.shape[2]
        kernel = read_tensor(self.kernel, torch.float64, device).div_(self.shape()[1])
        kernel = kernel if scale == 1 else kernel.mul_(scale)

        def rows(part: slice) -> torch.Tensor:
            i = torch.arange(part.start, part.stop, device=device)
            turn = (torch.arange(size, device=device) - i.unsqueeze(1)) % size
            held = kernel[i // size]
            return held.gather(2, turn.unsqueeze(1).expand(held.shape)).flatten(1)

        return rows

    def norm(self) -> float:
        import torch

        kernel = read_tensor(self.kernel, torch.float64)
        return math.sqrt(kernel.shape[2]) * float(torch.linalg.vector_norm(kernel)) / self.shape()[1]
