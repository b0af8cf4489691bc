"""DoRA: W′ = m ∘ V / ‖V‖, V = W + ΔW (Liu et al. 2024, arXiv:2402.09353, equation 5).

The norm runs over the axes where `magnitude` has size 1, so (out, 1) (peft, newer LyCORIS) and (1, in) (peft's embeddings,
the from-scratch tutorial, older LyCORIS) need no flag; (1, in, 1, …) is one for each input channel of a convolution. No epsilon is
added: peft 0.21 has none (`tuners/lora/dora.py`), and LyCORIS' 1e-7 is far below what its float32 shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Additive, Affine, Bound, Delta, Keep, Read, require_floating
from loratools.deltas.lowrank import LowRank
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class DoRA(Delta):
    """W′ = magnitude ∘ (W + ΔW) / ‖W + ΔW‖ for any additive direction; magnitude (out, 1, …) or (1, in)."""

    kind = "dora"

    direction: Additive
    magnitude: Ref

    def spec(self, base: Spec | None) -> Spec:
        found = self.direction.spec(base)
        require_floating(self.magnitude.spec)
        shape = self.magnitude.spec.shape
        expected = (found.shape[0], 1) if self.axis == "out" else (1, found.shape[1])
        if shape[:2] != expected or any(size != 1 for size in shape[2:]):
            raise ShapeError("the magnitude does not fit the weight", found=list(shape), expected=list(expected))
        return found

    @property
    def axis(self) -> str:
        """`out`: one norm for each output row; `in`: one for each input column; of a single number, the axis there is."""
        shape, rows = self.magnitude.spec.shape, self.direction.shape()[0]
        return "in" if len(shape) >= 2 and shape[0] == 1 and (shape[1] > 1 or rows > 1) else "out"

    def fitted(self, base: Spec) -> Self:
        size = self.magnitude.spec.numel
        sides = (size, 1) if self.axis == "out" else (1, size)
        magnitude = self.magnitude.reshape(*sides, *(1,) * (len(base.shape) - 2))
        return replace(self, direction=self.direction.fitted(base), magnitude=magnitude)

    def matrix(self, base: Spec) -> tuple[int, int]:
        return self.direction.matrix(base)

    def facts(self) -> dict[str, Any]:
        return self.direction.facts()

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        assert base is not None
        magnitude = read_tensor(self.magnitude, torch.float64, device)
        direct = self.direction.bind(base, read, device)
        return _by_rows(magnitude.reshape(-1, 1), direct) if self.axis == "out" else _by_columns(magnitude, direct, read)

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        """W′ = g∘(W + ΔW), g = m/‖W + ΔW‖ being what must be kept; at a strength s, a = 1 + s(g − 1) and d = (s·g/a)∘ΔW."""
        direction = self.direction.affine(base, read, keep, 1.0, device)
        if direction is None:
            return None
        by_rows = self.axis == "out"
        g = keep(lambda: self._factors(base, read, device)).reshape(-1 if by_rows else 1, 1 if by_rows else -1)
        a = g if strength == 1 else 1 + strength * (g - 1)
        share = None if strength == 1 else strength * g / a

        def rows(part: slice) -> tuple[Tensor | None, Tensor]:
            d = direction(part)[1]
            if share is not None:
                d = d.mul_(share[part] if by_rows else share)
            return a[part] if by_rows else a, d

        return rows

    def _factors(self, base: Spec, read: Read, device: str) -> Tensor:
        """g for each row or column, from a pass over W."""
        import torch

        from loratools.linalg.norms import ROWS, row_squares

        magnitude = read_tensor(self.magnitude, torch.float64, device).reshape(-1)
        direct = self.direction.bind(base, read, device)
        if self.axis == "out":
            squares = torch.cat([row_squares(direct(part, W)) for part, W in read(ROWS)])
            return magnitude / squares.sqrt_()
        return _column_factors(magnitude, direct, read)

    def refs(self) -> dict[str, Ref]:
        return {**self.direction.refs(), "magnitude": self.magnitude}

    def map(self, fn: object) -> Self:
        return replace(self, direction=self.direction.map(fn), magnitude=fn(self.magnitude))  # type: ignore[arg-type,operator]

    def transposed(self) -> Self:
        """The delta of Wᵀ."""
        if not isinstance(self.direction, LowRank):
            raise UnsupportedError(f"transposing {self.direction.called}")
        return replace(self, direction=self.direction.transposed(), magnitude=self.magnitude.T)


def _by_rows(magnitude: Tensor, direct: Bound) -> Bound:
    from loratools.linalg.norms import row_squares

    def rows(part: slice, W: Tensor | None) -> Tensor:
        V = direct(part, W)
        return V.mul_(magnitude[part] / row_squares(V).sqrt_().unsqueeze(1))

    return rows


def _by_columns(magnitude: Tensor, direct: Bound, read: Read) -> Bound:
    factor = _column_factors(magnitude.reshape(-1), direct, read)
    return lambda part, W: direct(part, W).mul_(factor)


def _column_factors(magnitude: Tensor, direct: Bound, read: Read) -> Tensor:
    """m/‖V‖ for each column; a convolution's are (in, kernel), and an input channel has one norm over all of its kernel."""
    from loratools.linalg.norms import ROWS, column_squares, row_sums

    squares = column_squares(direct(part, W) for part, W in read(ROWS))
    kernel = squares.numel() // magnitude.numel()
    channels = row_sums(squares.reshape(-1, kernel)) if kernel > 1 else squares
    return (magnitude / channels.sqrt_()).repeat_interleave(kernel)
