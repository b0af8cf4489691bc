"""Butterfly: a weight times several block-diagonal rotations in turn, between which columns change places: BOFT.

Liu et al. 2024 (arXiv:2311.06243); peft 0.21.2 `tuners/boft/layer.py` (`block_butterfly_perm`, on W's columns), lycoris
`functional/boft.py` (on its rows). Factor i mixes within 2ⁱ·b neighbours, b the size of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.base import Bound, Read
from loratools.deltas.turn import Turning, columns_turned, exactness, rows_turned
from loratools.errors import ShapeError
from loratools.refs import Spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Butterfly(Turning):
    """W′ = scale ∘ (W·F₁·F₂…) for side "in", scale ∘ (…F₂·F₁·W) for "out", Fᵢ = Gᵢᵀ·diag(rotations)·Gᵢ, Gᵢ a change of places.

    numbers (factors, blocks, b, b). Before factor i two neighbouring groups of 2ⁱ·b/2 are dealt
    out in turn, half a block at a time (`halves`, peft) or one by one (lycoris). scale: a number for each row. Raises ShapeError for
    numbers that are not such blocks.
    """

    kind = "boft"

    halves: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = self.numbers.spec.shape
        count, size = shape[0], shape[-1]
        if len(shape) != 4 or not shape[1] or (count > 1 and (size % 2 or shape[1] % 2 ** (count - 1))):
            expected = "[m, blocks, b, b] with an even b and blocks a multiple of 2^(m − 1)"
            raise ShapeError("no factors of a butterfly", found=list(shape), expected=expected)

    def extent(self) -> int:
        return math.prod(self.numbers.spec.shape[1:3])

    @property
    def align(self) -> int | None:
        shape = self.numbers.spec.shape
        return 1 if self.side == "in" else int(2 ** (shape[0] - 1) * shape[2])

    def places(self, factor: int, count: int) -> Tensor:
        """Where each of `count` neighbours comes from before a factor."""
        import torch

        size = self.numbers.spec.shape[-1]
        if not factor and (self.halves or size % 2):
            return torch.arange(count)
        grain = size // 2 if self.halves else 1
        return torch.arange(count).view(-1, 2, 2**factor * (size // 2) // grain, grain).transpose(1, 2).reshape(-1)

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        shape = self.numbers.spec.shape
        R = self.rotations().reshape(shape).to(device)
        scale, slices = self.factors(device), exactness(base)
        stage = self._columns if self.side == "in" else self._rows
        stages = [stage(factor, R[factor], slices) for factor in range(shape[0])]

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            for apply in stages:
                W = apply(part, W)
            return W if scale is None else W.mul_(scale[part])

        return rows

    def _columns(self, factor: int, R: Tensor, slices: int) -> Callable[[slice, Tensor], Tensor]:
        to = self.places(factor, self.extent()).to(R.device)
        back, times = to.argsort(), columns_turned(R, slices)
        return lambda part, W: times(W[:, to])[:, back]

    def _rows(self, factor: int, R: Tensor, slices: int) -> Callable[[slice, Tensor], Tensor]:
        size = R.shape[-1]

        def apply(part: slice, W: Tensor) -> Tensor:
            to = self.places(factor, len(W)).to(W.device)
            return rows_turned(R[part.start // size : part.stop // size], W[to], slices)[to.argsort()]

        return apply
