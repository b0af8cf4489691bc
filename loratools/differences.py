"""The difference of two stored tensors: told by their bytes while both are hashed, then computed from their exact values.

A difference of 16-bit or float32 values is rounded once, to float32: ‖D − Δ‖ ≤ 2⁻²⁴·‖Δ‖, a third of what writing float32
factors costs (tests/test_differences.py), and half the memory of float64. Where float64 costs nothing worth saving (small
tensors), where the input is float64, and where LAPACK's whole SVD was asked for, it is float64, in which differences of
16-bit and float32 values of like size are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from loratools.errors import NonFiniteError
from loratools.refs import Buffer, Ref, Spec
from loratools.tensors import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 18  # elements read at a time
SMALL = 1 << 20  # elements up to which a difference is float64: 8 MiB


@dataclass(frozen=True)
class Compared:
    """Whether two tensors have the same dtype and bytes, and the BLAKE3 of each, in hex."""

    same: bool
    base: str
    tuned: str


def compare(base: Ref, tuned: Ref) -> Compared:
    """Both tensors read once, by blocks; their shapes are the same."""
    import numpy as np

    if base.spec.dtype != tuned.spec.dtype:
        return Compared(False, digest(base), digest(tuned))
    same, hashes = True, (blake3(), blake3())
    for one, other in zip(base.blocks(), tuned.blocks(), strict=True):
        hashes[0].update(one)
        hashes[1].update(other)
        same = same and np.array_equal(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8))
    return Compared(same, hashes[0].hexdigest(), hashes[1].hexdigest())


def digest(ref: Ref) -> str:
    """The BLAKE3 of a tensor's bytes, in hex."""
    found = blake3()
    for block in ref.blocks():
        found.update(block)
    return found.hexdigest()


@dataclass(frozen=True)
class Difference:
    """D = tuned − base, flat, float32 or float64, with ‖D‖ and ‖base‖, and the share of elements whose value is the same.

    `rounding` bounds ‖D − Δ‖ for the exact difference Δ of the stored values.
    """

    D: Tensor
    norm: float
    base_norm: float
    unchanged: float

    @property
    def rounding(self) -> float:
        import torch

        # one rounding an element, |D − Δ| ≤ u·|Δ|, and ‖Δ‖ ≤ ‖D‖ / (1 − u) (Higham 2002, section 2.2)
        u = torch.finfo(self.D.dtype).eps / 2
        return 1.01 * u * self.norm

    @property
    def relative_norm(self) -> float | None:
        return self.norm / self.base_norm if self.base_norm else None


def measurable(spec: Spec) -> bool:
    """Whether the elements are numbers that torch can subtract."""
    return spec.dtype not in ("F4", "F6_E2M3", "F6_E3M2", "C64")


def difference(base: Ref, tuned: Ref, *, wide: bool = False) -> Difference:
    """The difference of two tensors of one shape, computed block by block; `wide` asks for float64 whatever the size.

    Raises NonFiniteError, without a place, when either holds inf or nan or the difference overflows.

    >>> import torch
    >>> from loratools.tensors import to_ref
    >>> found = difference(to_ref(torch.tensor([3.0, 4.0])), to_ref(torch.tensor([3.0, 5.0])))
    >>> found.D.tolist(), found.norm, found.base_norm, found.unchanged
    ([0.0, 1.0], 1.0, 5.0, 0.5)
    """
    import torch

    count = base.spec.numel
    floats = all(ref.spec.floating and ref.spec.dtype != "F64" for ref in (base, tuned))
    dtype = torch.float32 if floats and not wide and count > SMALL else torch.float64
    D = torch.empty(count, dtype=dtype)
    readers = _Reader(base, dtype), _Reader(tuned, dtype)
    squares, base_squares, same = 0.0, 0.0, 0
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        before, after = (reader.read(start, stop) for reader in readers)
        part = torch.sub(after, before, out=D[start:stop])
        squares += _squares(part)
        base_squares += _squares(before)
        same += part.numel() - int(torch.count_nonzero(part))
    if not math.isfinite(base_squares):
        raise NonFiniteError("the base's tensor holds inf or nan")
    if not math.isfinite(squares):
        raise NonFiniteError("the tuned tensor holds inf or nan, or the difference overflows")
    return Difference(D, math.sqrt(squares), math.sqrt(base_squares), same / count)


def _squares(block: Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


class _Reader:
    """Elements of a tensor in a wide dtype, through buffers that are used again."""

    def __init__(self, ref: Ref, dtype: object) -> None:
        import torch

        self.ref = ref.reshape(ref.spec.numel)
        size = min(BLOCK, ref.spec.numel)
        self.raw: Buffer = bytearray(size * self.ref.spec.row_bytes())
        self.wide = torch.empty(size, dtype=dtype)  # type: ignore[call-overload]

    def read(self, start: int, stop: int) -> Tensor:
        count = stop - start
        view = memoryview(self.raw)[: count * self.ref.spec.row_bytes()]
        self.ref.readinto(start, stop, view)
        wide: Tensor = self.wide[:count]
        return wide.copy_(as_tensor(view, Spec(self.ref.spec.dtype, (count,))))
