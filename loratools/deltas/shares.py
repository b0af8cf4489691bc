"""Shares: how many coefficients each layer of an adapter has, of as many for all as layers, in proportion to its weight's size.

peft 0.21.2 `tuners/waveft/model.py::_calculate_proportional_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from loratools.deltas.seeded import Bank

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class Shares(Bank):
    """What all layers together decide, like a bank's size, and nothing is drawn for.

    `rank` is the number of coefficients that a layer has on the average, `out` that of all layers' elements, `width` that of layers.

    >>> found = Shares(seed=0, rank=100).sized([(10, 10), (10, 30)])
    >>> found.of(10, 10), found.of(10, 30)
    (50, 150)
    """

    def sized(self, shapes: Iterable[tuple[int, ...]]) -> Self:
        sizes = [out * width for out, width in shapes]
        return self if self.out else replace(self, out=sum(sizes), width=len(sizes))

    def of(self, out: int, width: int) -> int:
        """The coefficients of an (out, width) weight."""
        return max(1, round(width * out / self.out * (self.rank * self.width)))

    def _draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing to draw")
