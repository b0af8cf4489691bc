"""Sparse: a difference at few places of a weight, whose file names them.

SHiRA, Bhardwaj et al. 2024 (arXiv:2406.13175); Super-Tuning (arXiv:2607.09287). peft 0.21.2 `tuners/shira/layer.py` has rows and columns,
`tuners/supertuning/layer.py` one number for each place.
"""

from __future__ import annotations

from dataclasses import dataclass

from loratools.deltas.base import Dense
from loratools.deltas.indexed import read_places
from loratools.deltas.scattered import Entries, entries, scattered
from loratools.deltas.sized import Sized
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

_PLACES = ("I8", "U8", "I16", "I32", "I64", "F32", "F64")


@dataclass(frozen=True, eq=False, kw_only=True)
class Sparse(Sized):
    """W′ = W, with values[i] added at places[i]; places named twice get the sum.

    values (n); places (n), counted row by row, or (2, n), rows and columns: whole numbers of any dtype that holds them. Raises
    ShapeError when they do not meet, UnsupportedError for a dtype, and later FormatError for places outside the weight.
    """

    kind = "sparse"
    reproducible = True
    factored = True
    indices = ("places",)

    values: Ref
    places: Ref

    def __post_init__(self) -> None:
        values, places = self.values.spec.shape, self.places.spec.shape
        if len(values) != 1 or places not in (values, (2, *values)):
            raise ShapeError("not a place for each value", found=f"{list(values)}, {list(places)}", expected="[n], and [n] or [2, n]")
        if self.places.spec.dtype not in _PLACES:
            raise UnsupportedError("places of a dtype that does not hold whole numbers exactly", found=self.places.spec)

    def check(self, out: int, width: int) -> None:
        if self.values.spec.numel > out * width:
            raise ShapeError("more places than the weight has", found=self.values.spec.numel, expected=f"at most {out * width}")

    def entries(self, out: int, width: int, device: str = "cpu") -> Entries:
        """Where it changes an (out, width) weight, and by how much."""
        import torch

        return entries(read_places(self.places, out, width, device=device), read_tensor(self.values, torch.float64, device))

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        out, width = base.shape
        return scattered(self.entries(out, width, device), width, scale)

    def norm(self) -> float:
        import torch

        assert self.size is not None
        return float(torch.linalg.vector_norm(self.entries(*self.size).values))
