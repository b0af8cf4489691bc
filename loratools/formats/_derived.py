"""Tensors made of others by moving elements about: slices, blocks, transposes. Bytes in another order, never arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.refs import BITS, Buffer, Ref, Spec

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


def spread_blocks(ref: Ref, count: int) -> Ref:
    """A matrix (rows, columns) cut into `count` blocks of rows, each in columns of its own: (rows, columns · count)."""
    rows, columns = ref.spec.shape

    def make(found: np.ndarray) -> np.ndarray:
        import numpy as np

        made = np.zeros((count, rows // count, count, columns), found.dtype)
        for index, block in enumerate(found.reshape(count, rows // count, columns)):
            made[index, :, index] = block
        return made.reshape(rows, count * columns)

    return Derived(ref, (rows, count * columns), make)


def rows_apart(ref: Ref, enable: tuple[bool, ...]) -> Ref:
    """A matrix (slots on · size, columns) with rows of zeros for the slots that are off: (all slots · size, columns)."""
    on = [slot for slot, flag in enumerate(enable) if flag]
    size, columns = ref.spec.shape[0] // len(on), ref.spec.shape[1]

    def make(found: np.ndarray) -> np.ndarray:
        import numpy as np

        made = np.zeros((len(enable), size, columns), found.dtype)
        made[on] = found.reshape(len(on), size, columns)
        return made.reshape(len(enable) * size, columns)

    return Derived(ref, (len(enable) * size, columns), make)


def repeated(ref: Ref, times: int) -> Ref:
    """A matrix (rows, columns) with each column `times` over, side by side: (rows, columns · times)."""
    rows, columns = ref.spec.shape

    def make(found: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.repeat(found, times, axis=1)

    return Derived(ref, (rows, columns * times), make)


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


class Joined(Ref):
    """Tensors joined along an axis, each as it is or negated, in the narrowest dtype that holds all of their numbers."""

    def __init__(self, parts: tuple[Ref, ...], axis: int, *, negated: tuple[bool, ...]) -> None:
        self.parts, self.axis, self.negated = parts, axis, negated
        codes = {ref.spec.dtype for ref in parts}
        shape = list(parts[0].spec.shape)
        shape[axis] = sum(ref.spec.shape[axis] for ref in parts)
        self.spec = Spec("F64" if "F64" in codes else codes.pop() if len(codes) == 1 else "F32", tuple(shape))

    def read(self) -> Buffer:
        import torch

        from loratools.tensors import read_tensor, tensor_bytes, torch_dtype

        dtype = torch_dtype(self.spec.dtype)
        read = [read_tensor(ref, dtype) for ref in self.parts]
        signed = [-tensor if flag else tensor for tensor, flag in zip(read, self.negated, strict=True)]
        return tensor_bytes(torch.cat(signed, dim=self.axis).contiguous())

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read())[start * step : stop * step]
