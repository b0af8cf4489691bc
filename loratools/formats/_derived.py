"""Tensors made of others by moving elements about: slices, blocks, transposes. Bytes in another order, never arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.tensorfile import BITS, Buffer, Ref, Spec

if TYPE_CHECKING:
    import numpy as np


class Derived(Ref):
    """A tensor of the shape given, whose elements `make` arranges from those of `origin` when it is read.

    `make` gets the elements as an array of opaque cells in the origin's shape; a cell of zero bytes is the number 0.
    """

    def __init__(self, origin: Ref, shape: tuple[int, ...], make: Callable[[np.ndarray], np.ndarray]) -> None:
        self.origin, self.make = origin, make
        self.spec: Spec = replace(origin.spec, shape=shape)

    def read(self) -> Buffer:
        import numpy as np

        made = np.ascontiguousarray(self.make(cells(self.origin)))
        if made.shape != self.spec.shape:
            raise ValueError(f"made {made.shape} instead of {self.spec.shape}")
        return memoryview(made.tobytes())

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read())[start * step : stop * step]


def cells(ref: Ref) -> np.ndarray:
    """The elements of a tensor as opaque cells, which can be compared and moved about whatever the dtype."""
    import numpy as np

    return np.frombuffer(ref.read(), dtype=f"V{BITS[ref.spec.dtype] // 8}").reshape(ref.spec.shape)


def member(ref: Ref, index: int) -> Ref:
    """One matrix of a stack (members, rows, columns)."""
    return Derived(ref, ref.spec.shape[1:], lambda found: found[index])


def block_diagonal(ref: Ref, copies: int) -> Ref:
    """`copies` of a matrix along the diagonal, zeros elsewhere."""
    rows, columns = ref.spec.shape

    def make(found: np.ndarray) -> np.ndarray:
        import numpy as np

        made = np.zeros((copies, rows, copies, columns), found.dtype)
        for index in range(copies):
            made[index, :, index] = found
        return made.reshape(copies * rows, copies * columns)

    return Derived(ref, (copies * rows, copies * columns), make)


def slots_apart(ref: Ref, enable: tuple[bool, ...]) -> Ref:
    """B of a merged linear layer, (slots on · size, r), as (all slots · size, r · slots on): each slot's rows in columns of its own."""
    on = [slot for slot, flag in enumerate(enable) if flag]
    size, rank = ref.spec.shape[0] // len(on), ref.spec.shape[1]
    shape = (len(enable) * size, rank * len(on))

    def make(found: np.ndarray) -> np.ndarray:
        import numpy as np

        made = np.zeros((len(enable), size, len(on), rank), found.dtype)
        for place, slot in enumerate(on):
            made[slot, :, place] = found.reshape(len(on), size, rank)[place]
        return made.reshape(shape)

    return Derived(ref, shape, make)
