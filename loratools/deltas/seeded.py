"""Random numbers that layers share and that peft draws again where a file does not hold them: a seed, a rank, the largest sizes.

peft 0.21.2 `tuners/vera/model.py`, `tuners/pvera/model.py`, `tuners/randlora/model.py`: torch's generator on the CPU, A before B. Drawn
again by the same torch calls they are the same numbers; another build of torch may round the last bit of one in another way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

from loratools.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True, kw_only=True)
class Bank(ABC):
    """A and B that the layers of an adapter share and its file lacks; `out` and `width` are the largest of all these layers."""

    seed: int
    rank: int
    out: int = 0
    width: int = 0

    def sized(self, shapes: Iterable[tuple[int, ...]]) -> Self:
        """The same bank for layers of these (out, in); one that has its sizes keeps them."""
        if self.out:
            return self
        outs, widths = zip(*shapes, strict=True)
        return replace(self, out=max(outs), width=max(widths))

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """(A, B), drawn when first asked for. Raises UnsupportedError as long as no base told the sizes."""
        import torch

        if not self.out:
            raise UnsupportedError("random projections as large as the largest layer, which only the base tells", remedy="give its base")
        return self._draw(torch.Generator(device="cpu").manual_seed(self.seed))

    @abstractmethod
    def _draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        """(A, B) from a generator that was just seeded."""


@dataclass(frozen=True, kw_only=True)
class Projections(Bank):
    """VeRA's: A (parts·rank, width), B (out, rank), Kaiming-uniform in float32; PVeRA's A has two parts.

    >>> A, B = Projections(seed=0, rank=2, out=5, width=3).tensors
    >>> tuple(A.shape), tuple(B.shape)
    ((2, 3), (5, 2))
    """

    parts: int = 1

    def _draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        import torch

        empty = [torch.empty(self.parts * self.rank, self.width), torch.empty(self.out, self.rank)]
        A, B = (torch.nn.init.kaiming_uniform_(tensor, generator=generator) for tensor in empty)
        return A, B


@dataclass(frozen=True, kw_only=True)
class Bases(Bank):
    """RandLoRA's: A (rank, 1, short), B (long, ⌈short / rank⌉, rank), each over its standard deviation.

    Uniform in bfloat16; or, with a sparsity s, −1 and 1 with a probability of 1/(2s) each, else 0: s is 3 (`sparse`) or √short
    (`very_sparse`).
    """

    sparse: bool = False
    very_sparse: bool = False

    def _draw(self, generator: Generator) -> tuple[Tensor, Tensor]:
        import torch

        short, long = sorted((self.out, self.width))
        count = -(-short // self.rank)
        if self.sparse or self.very_sparse:
            sparsity = math.sqrt(short) if self.very_sparse else 3
            A, B = (torch.rand(shape, generator=generator) for shape in ((self.rank, 1, short), (long, count, self.rank)))
            return _even(_ternary(A, sparsity)), _even(_ternary(B, sparsity))
        A = _uniform((self.rank, 1, short), generator)
        B = torch.cat([_uniform((long, 1, self.rank), generator) for _ in range(count)], dim=1)
        return _even(A), _even(B)


def _uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    import torch

    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _ternary(numbers: Tensor, sparsity: float) -> Tensor:
    edge = 1 / (2 * sparsity)
    return (numbers > 1 - edge).to(numbers.dtype) - (numbers < edge).to(numbers.dtype)


def _even(numbers: Tensor) -> Tensor:
    """The numbers over their standard deviation, which is summed in an order that threads do not change."""
    import torch

    from loratools.linalg.norms import row_squares, row_sums

    wide = numbers.to(torch.float64).flatten(1)
    total, squares = (math.fsum(sums.tolist()) for sums in (row_sums(wide), row_squares(wide)))
    count = numbers.numel()
    deviation = math.sqrt((squares - total * total / count) / (count - 1))
    return numbers / torch.tensor(deviation, dtype=numbers.dtype)


def normal(seed: int, count: int, rank: int) -> Tensor:
    """TinyLoRA's `count` projections (count, rank, rank), normal with a variance of 1/rank (`tuners/tinylora/layer.py`)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(count, rank, rank), generator=generator)
