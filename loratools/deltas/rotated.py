"""Rotated: a weight times small rotations of its columns, or of its rows, side by side along the diagonal: OFT.

Qiu et al. 2023 (arXiv:2306.07280), section 3. peft 0.21.2 `tuners/oft/layer.py` rotates the input, W′ = W·R; lycoris
`modules/diag_oft.py` the output, W′ = R·W, and scales it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.base import Bound, Read
from loratools.deltas.turn import Turning, columns_turned, exactness, rows_turned
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Rotated(Turning):
    """W′ = scale ∘ (W·R) for side "in", scale ∘ (R·W) for "out"; R has the rotations along its diagonal.

    numbers (blocks, b·(b − 1)/2) or (blocks, b, b); `shared`: one block for all. scale: a number for each row. `pointwise`: only for
    kernels of size 1. Raises ShapeError where the blocks do not cover the weight, UnsupportedError for kernels where they must not.
    """

    kind = "oft"

    shared: bool = False
    pointwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shared and self.blocks()[0] != 1:
            raise ShapeError("one block is shared by all", found=list(self.numbers.spec.shape), expected="one block")

    def covers(self, found: int) -> bool:
        return found % self.extent() == 0 if self.shared else super().covers(found)

    def spec(self, base: Spec | None) -> Spec:
        if self.pointwise and base is not None and any(size != 1 for size in base.shape[2:]):
            raise UnsupportedError(
                "turns each patch of the input and adds the patches up where they overlap: no change of a kernel larger than 1 does that",
                found=list(base.shape), remedy="no merged weight gives what was trained: serve it with peft",
            )  # fmt: skip
        return super().spec(base)

    @property
    def align(self) -> int | None:
        return 1 if self.side == "in" else self.blocks()[1]

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        R = self.rotations().to(device)
        scale, size, slices = self.factors(device), R.shape[-1], exactness(base)
        count = base.matrix[1 if self.side == "in" else 0] // size
        R = R.expand(count, size, size)
        right = columns_turned(R, slices) if self.side == "in" else None

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            found = right(W) if right is not None else rows_turned(R[part.start // size : part.stop // size], W, slices)
            return found if scale is None else found.mul_(scale[part])

        return rows
