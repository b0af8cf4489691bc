"""What one delta does to a weight, W′ − W as exact as float64 has it: a matrix to be decomposed, or a tensor to be stored.

Blocks are of a fixed size and sums in a fixed order, so the same bytes come out for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.changes import Changes, reader
from loratools.deltas.base import Delta, Read
from loratools.differences import SMALL
from loratools.errors import LoratoolsError, NonFiniteError
from loratools.refs import BLOCK_BYTES, Buffer, Ref, Spec
from loratools.rounding import Rounding
from loratools.tensors import tensor_bytes, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

@dataclass(frozen=True, kw_only=True)
class Change:
    """W′ − W as a matrix of W's own rows, float32 if it is large, else float64; `rounding` bounds what float64 would have had more."""

    D: Tensor
    norm: float

    @property
    def rounding(self) -> float:
        import torch

        return 1.01 * 2.0**-24 * self.norm if self.D.dtype == torch.float32 else 0.0


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A delta on a weight of this spec, of which `weight` may be missing for a difference."""

    delta: Delta
    spec: Spec
    weight: Ref | None = None
    device: str = "cpu"

    @property
    def wide(self) -> Spec:
        """The weight in float64: deltas are as exact as what is written can show."""
        return Spec("F64", self.spec.shape)

    def read(self) -> Read:
        """W's rows in float64, for a look of one's own."""
        assert self.weight is not None
        return reader(self.weight, self.delta.matrix(self.wide)[1], self.device)

    def differences(self) -> Iterator[Tensor]:
        """Rows of W′ − W in float64, in order; each may be overwritten, and is valid until the next.

        Raises NonFiniteError where W′ is no number: inf or nan in W or the delta, or a DoRA's W + ΔW of no length.
        """
        changes = Changes([(self.delta, 1.0)], self.spec, self.weight, written="F64", device=self.device)
        for D in changes.one(0):
            if not math.isfinite(square(D)):
                remedy = "look at adapter and base with inspect --values for inf and nan; a DoRA needs W + ΔW to have a length everywhere"
                raise NonFiniteError("W' is not finite", remedy=remedy)
            yield D

    def change(self) -> Change:
        """All of W′ − W, held in memory."""
        import torch

        D = torch.empty(self.spec.numel, dtype=torch.float64 if self.spec.numel <= SMALL else torch.float32, device=self.device)
        start, squares = 0, list[float]()
        for block in self.differences():
            squares.append(square(D[start : start + block.numel()].copy_(block.reshape(-1))))
            start += block.numel()
        return Change(D=D.view(self.spec.matrix), norm=math.sqrt(math.fsum(squares)))


class Made(Ref):
    """W′ − W as the tensor that is stored: computed when it is read, a block at a time, rounded once, measured as it passes.

    `norm` is ‖W′ − W‖ and `error` that of the rounding; both are None until it was read through. Errors name `tensor`.
    """

    def __init__(self, effect: Effect, code: str, tensor: str | None = None) -> None:
        self.effect, self.spec, self.tensor = effect, Spec(code, effect.spec.shape), tensor
        self.norm: float | None = None
        self.error: float | None = None

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
        try:
            yield from self._rounded()
        except LoratoolsError as error:
            raise error.at(tensor=self.tensor) from None

    def _rounded(self) -> Iterator[Buffer]:
        import torch

        rounded, norm, error = Rounding(), list[float](), list[float]()
        for D in self.effect.differences():
            out = torch.empty(D.shape, dtype=torch_dtype(self.spec.dtype))
            rounded(D.contiguous(), out)
            if not bool(torch.isfinite(out).all()):
                found, remedy = f"{float(D.abs().max()):g}", "give a wider --dtype"
                raise NonFiniteError(f"W' - W would not be finite in {self.spec.dtype}", found=found, remedy=remedy)
            norm.append(square(D))
            error.append(square(D.sub_(out.to(D.device))))
            yield tensor_bytes(out)
        self.norm, self.error = math.sqrt(math.fsum(norm)), math.sqrt(math.fsum(error))

    def read(self) -> Buffer:
        return b"".join(map(bytes, self.blocks()))

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read())[start * step : stop * step]


def square(block: Tensor) -> float:
    """The sum of squares in float64."""
    import torch

    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
