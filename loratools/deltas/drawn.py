"""Drawn: a difference made of few coefficients whose places no file holds; they are drawn from a seed again, as peft draws them.

peft 0.21.2, `tuners/fourierft/layer.py` and `tuners/waveft/layer.py`: the first of all places, shuffled by torch's generator on the CPU.
Another release of torch may shuffle otherwise, so nothing of this is promised to be the same on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loratools.deltas.scattered import Entries, entries
from loratools.deltas.sized import Sized
from loratools.errors import ShapeError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Drawn(Sized):
    """A scale times what n coefficients, the spectrum, are the transform of. Raises ShapeError where the weight has fewer places."""

    spectrum: Ref
    seed: int
    scale: float

    def __post_init__(self) -> None:
        if len(self.spectrum.spec.shape) != 1:
            raise ShapeError("not a vector of coefficients", found=list(self.spectrum.spec.shape), expected="[n]")

    def check(self, out: int, width: int) -> None:
        count = self.spectrum.spec.numel
        if count > out * width:
            raise ShapeError("more coefficients than the weight has elements", found=count, expected=f"at most {out * width}")

    def facts(self) -> dict[str, Any]:
        return {"scaling": self.scale}

    def coefficients(self, out: int, width: int, device: str = "cpu") -> Entries:
        """The coefficients of an (out, width) weight by their places."""
        import torch

        values = read_tensor(self.spectrum, torch.float64, device)
        return entries(places(self.seed, len(values), out, width).to(device), values)


@lru_cache(maxsize=16)  # layers of one size have the same, and shuffling takes seconds
def places(seed: int, count: int, out: int, width: int) -> Tensor:
    """`count` places of an (out, width) matrix, counted row by row.

    >>> places(0, 3, 2, 2).tolist()
    [2, 0, 1]
    """
    import torch

    return torch.randperm(out * width, generator=torch.Generator().manual_seed(seed))[:count].clone()
