"""WaveFT: ΔW is one step of an inverse wavelet transform of a matrix that is zero but for few coefficients.

Bilican et al. 2025 (arXiv:2505.12532), section 3; peft 0.21.2 `tuners/waveft/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

from loratools.deltas.base import Dense
from loratools.deltas.drawn import Drawn
from loratools.deltas.scattered import scattered
from loratools.deltas.seeded import Bank
from loratools.deltas.shares import Shares
from loratools.errors import ShapeError
from loratools.refs import Spec

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.wavelets import Filters


@dataclass(frozen=True, eq=False, kw_only=True)
class WaveFT(Drawn):
    """W′ = W + scale·D⁻¹(S), S with the spectrum at the places drawn; without a `wavelet`, W + scale·S.

    Of a wavelet with m coefficients S is (out + m − 2, in + m − 2), each made even, and the (out, in) places are those of its middle.
    With a `bank` the base must give it as many coefficients as it has. Raises OptionError for a wavelet that is not known.
    """

    kind = "waveft"

    wavelet: str | None = "db1"
    bank: Shares | None = None

    @property
    def draws(self) -> tuple[Bank, tuple[int, ...]] | None:
        return None if self.bank is None else (self.bank, self.shape())

    def drawn(self, bank: Bank) -> Self:
        """Raises ShapeError where it has not the share of coefficients that is its own."""
        assert isinstance(bank, Shares) and self.size is not None
        found, expected = self.spectrum.spec.numel, bank.of(*self.size)
        if found != expected:
            raise ShapeError("not as many coefficients as the weight's share of n_frequency for each layer", found=found, expected=expected)
        return replace(self, bank=bank)

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        from loratools.linalg.wavelets import filters

        out, width = base.shape
        dense = scattered(self.coefficients(out, width, device), width, self.scale * scale)
        return dense if self.wavelet is None else _Inverse(dense, out, width, *filters(self.wavelet), device).rows


@dataclass(frozen=True)
class _Inverse:
    """The transform by rows, each from the rows of S that its filters reach; `dense` gives those of S's middle."""

    dense: Dense
    out: int
    width: int
    low: Filters
    high: Filters
    device: str

    @cached_property
    def padded(self) -> tuple[int, int]:
        """The shape of S."""
        reach = len(self.low) - 2
        return self.out + reach + (self.out + reach) % 2, self.width + reach + (self.width + reach) % 2

    @cached_property
    def before(self) -> tuple[int, int]:
        """Rows and columns of S before its middle."""
        return (self.padded[0] - self.out) // 2, (self.padded[1] - self.width) // 2

    @cached_property
    def cut(self) -> tuple[int, int]:
        """Rows and columns of what is reconstructed that are before those of ΔW."""
        reach = len(self.low) - 2
        return reach + (self.padded[0] - reach - self.out) // 2, reach + (self.padded[1] - reach - self.width) // 2

    def rows(self, part: slice) -> Tensor:
        import torch

        from loratools.linalg.wavelets import combined

        half, first, last = self.padded[0] // 2, part.start + self.cut[0], part.stop - 1 + self.cut[0]
        start, stop = max((first - len(self.low) + 2) // 2, 0), min(last // 2 + 1, half)
        top, bottom = self._coefficients(start, stop), self._coefficients(start + half, stop + half)
        # of the four quarters peft takes the upper right one for what is high along columns and low along rows
        (a, h), (v, d) = top.tensor_split(2, dim=1), bottom.tensor_split(2, dim=1)
        lows, highs = self._across(torch.cat([a, v], dim=1)), self._across(torch.cat([h, d], dim=1))
        return combined(((lows, self.low), (highs, self.high)), first - 2 * start, part.stop - part.start)

    def _coefficients(self, start: int, stop: int) -> Tensor:
        """Rows of S."""
        import torch

        rows = torch.zeros(stop - start, self.padded[1], dtype=torch.float64, device=self.device)
        low, high = max(start - self.before[0], 0), min(stop - self.before[0], self.out)
        if low < high:
            at = low + self.before[0] - start
            rows[at : at + high - low, self.before[1] : self.before[1] + self.width] = self.dense(slice(low, high))
        return rows

    def _across(self, rows: Tensor) -> Tensor:
        """Rows of coefficients, low ones and then high ones, as rows of ΔW's width."""
        from loratools.linalg.wavelets import combined

        left, right = rows.T.tensor_split(2)
        return combined(((left, self.low), (right, self.high)), self.cut[1], self.width).T
