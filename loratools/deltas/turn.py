"""How numbers become small rotations that stand side by side along a diagonal, and a weight's columns or rows times them.

Cayley's transform of skew-symmetric blocks: Qiu et al. 2023 (arXiv:2306.07280); the first terms of its series: Qiu et al. 2025
(arXiv:2506.19847). Read from peft 0.21.2 `tuners/oft/layer.py`, `tuners/boft/layer.py` and lycoris `functional/diag_oft.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Delta, require_floating
from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.refs import Ref, Spec
from loratools.tensorfile import file_of
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

SIDES = ("in", "out")


@dataclass(frozen=True, eq=False, kw_only=True)
class Turning(Delta):
    """What block-diagonal rotations have in common: the numbers that make them, the side they act on, a factor for each row afterwards.

    numbers (count, b·(b − 1)/2) are what stands above the diagonals of skew-symmetric blocks X, its negative below, and of (…, b, b) the
    blocks are X − Xᵀ. Q is `factor` times that; one of a norm above `bound` is scaled down to it, each block's or that of all blocks
    `together`, `floor` added to the norm. A rotation is (I + Q)(I − Q)⁻¹ or, up to a `degree`, I + 2Q + 2Q² + … + last·Q^degree. `side`
    is "in", for W's columns, a convolution's in·kernel, or "out", for its rows; scale: a number for each row.
    """

    numbers: Ref
    side: str = "in"
    scale: Ref | None = None
    factor: float = 1.0
    degree: int | None = None
    last: float = 2.0
    bound: float | None = None
    together: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        self.blocks()
        if self.side not in SIDES:
            raise OptionError("side", found=self.side, expected="in or out")

    def blocks(self) -> tuple[int, int]:
        """(count, size) of the blocks. Raises ShapeError where the numbers make none."""
        shape = self.numbers.spec.shape
        size = triangle(shape[1]) if len(shape) == 2 else shape[-1] if len(shape) in (3, 4) and shape[-1] == shape[-2] else None
        if not size or 0 in shape[:-1]:
            raise ShapeError("makes no square blocks", found=list(shape), expected="[blocks, b·(b − 1)/2] or [..., b, b]")
        return (shape[0] if len(shape) == 2 else math.prod(shape[:-2])), size

    def rotations(self) -> Tensor:
        """(count, b, b) in float64, on the CPU. Raises NonFiniteError for numbers that hold inf or nan."""
        import torch

        from loratools.linalg import blocks

        count, size = self.blocks()
        X = read_tensor(self.numbers, torch.float64)
        Q = blocks.skew(X, size) if X.ndim == 2 else (X - X.transpose(-1, -2)).reshape(count, size, size)
        Q = Q * self.factor
        if not torch.isfinite(Q).all():
            raise NonFiniteError("the numbers of a rotation hold inf or nan", file=file_of(self.numbers))
        if self.bound is not None:
            Q = blocks.bounded(Q, self.bound, together=self.together, floor=self.floor)
        return blocks.cayley(Q) if self.degree is None else blocks.series(Q, self.degree, self.last)

    def extent(self) -> int:
        """The columns, or rows, that the blocks cover."""
        count, size = self.blocks()
        return count * size

    def covers(self, found: int) -> bool:
        """Whether the blocks make up this many columns, or rows."""
        return found == self.extent()

    def spec(self, base: Spec | None) -> Spec:
        found = None if base is None else base.matrix[1 if self.side == "in" else 0]
        if base is None or found is None or not self.covers(found):
            what = "columns" if self.side == "in" else "rows"
            raise ShapeError(f"turns other {what} than the weight has", found=self.extent(), expected=found)
        rows, shape = base.matrix[0], () if self.scale is None else self.scale.spec.shape
        if shape and (math.prod(shape), max(shape)) != (rows, rows):
            raise ShapeError("scales other rows than the weight has", found=list(shape), expected=[rows, 1])
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def facts(self) -> dict[str, Any]:
        return {"block": self.blocks()[1]}

    def factors(self, device: str) -> Tensor | None:
        """(rows, 1) in float64, or None where nothing is scaled."""
        import torch

        return None if self.scale is None else read_tensor(self.scale, torch.float64, device).reshape(-1, 1)


def triangle(count: int) -> int | None:
    """The b of b·(b − 1)/2 = count numbers above a diagonal; None where there is none.

    >>> triangle(6), triangle(5)
    (4, None)
    """
    size = (1 + math.isqrt(1 + 8 * count)) // 2
    return size if size * (size - 1) // 2 == count else None


def exactness(base: Spec) -> int:
    """Slices of an exact product that the dtype which is written can show."""
    return 3 if base.dtype == "F64" else 2


def columns_turned(R: Tensor, slices: int) -> Callable[[Tensor], Tensor]:
    """The map W → W·R for R block-diagonal, given as (count, b, b)."""
    from loratools.linalg.exact import ExactRight

    times, (count, size, _) = ExactRight(R, slices=slices), R.shape
    return lambda W: times(W.reshape(len(W), count, size).transpose(0, 1)).transpose(0, 1).reshape(W.shape)


def rows_turned(R: Tensor, W: Tensor, slices: int) -> Tensor:
    """R·W for R block-diagonal, given as (count, b, b), and all rows that it turns."""
    from loratools.linalg.exact import ExactRight

    return ExactRight(W.reshape(*R.shape[:2], -1), slices=slices)(R).reshape(W.shape)
