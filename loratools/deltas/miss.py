"""MiSS: one small matrix repeated along a weight's inputs, ΔW[o, j] = block[j mod r, o mod w].

Kang and Yin 2024 (Bone, now MiSS, arXiv:2409.15371); peft 0.21.2 `tuners/miss/layer.py`: w is out, or with `init_weights="mini"` the
smaller `mini_r`. The variant "bat" reads W and is `deltas/bat.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Dense
from loratools.deltas.sized import Sized
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class MiSS(Sized):
    """W′[o, j] = W[o, j] + block[j mod r, o mod w], block (r, w); w is out, or a divisor of it where the delta is `mini`.

    Raises ShapeError for a block that is no matrix.
    """

    kind = "miss"
    reproducible = True
    factored = True

    block: Ref
    mini: bool = False

    def __post_init__(self) -> None:
        if len(self.block.spec.shape) != 2 or not self.block.spec.numel:
            raise ShapeError("no matrix to repeat", found=list(self.block.spec.shape), expected="[r, out]")

    def check(self, out: int, width: int) -> None:
        rank, unit = self.block.spec.shape
        if (out % unit if self.mini else out != unit) or rank > width:
            expected = f"[a multiple of {unit}, at least {rank}]" if self.mini else f"[{unit}, at least {rank}]"
            raise ShapeError("does not fit the base's weight", found=[out, width], expected=expected)

    def facts(self) -> dict[str, Any]:
        return {"rank": self.block.spec.shape[0]}

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        import torch

        block, columns = self._block(device) * scale, torch.arange(base.shape[1], device=device) % self.block.spec.shape[0]
        unit = self.block.spec.shape[1]
        return lambda part: block[torch.arange(part.start, part.stop, device=device) % unit][:, columns]

    def _block(self, device: str = "cpu") -> Tensor:
        """The block turned, (w, r) in float64."""
        import torch

        return read_tensor(self.block, torch.float64, device).T.contiguous()

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Of rank r: the block turned, and A[i, j] = 1 where j mod r is i."""
        import torch

        assert self.size is not None
        (out, width), (rank, unit) = self.size, self.block.spec.shape
        A = torch.zeros(rank, width, dtype=torch.float64, device=device)
        j = torch.arange(width, device=device)
        A[j % rank, j] = 1
        return self._block(device).repeat(out // unit, 1), A

    def norm(self) -> float:
        assert self.size is not None
        (out, width), (rank, unit) = self.size, self.block.spec.shape
        squares = self._block().square().sum(0) * (out // unit)
        return math.sqrt(sum(float(square) * len(range(i, width, rank)) for i, square in enumerate(squares)))
