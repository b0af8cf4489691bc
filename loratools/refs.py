"""Tensors not read yet: a `Spec` is a tensor as a header tells it, a `Ref` that and its bytes when they are asked for.

Here live those that need neither torch nor a file: in memory, reshaped, transposed. All give little-endian bytes in row-major
order, rows being the first axis.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from loratools.errors import FormatError

Buffer: TypeAlias = bytes | bytearray | memoryview

# bits an element takes, in the order of safetensors' specification
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64")
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Spec:
    """A tensor as a header tells it: dtype by its safetensors name, shape, and the name of a quantisation, if any.

    >>> Spec("BF16", (2, 3)).nbytes
    12
    """

    dtype: str
    shape: tuple[int, ...]
    encoding: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor seen as a matrix whose rows are the first axis; a vector is one column."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])

    @property
    def floating(self) -> bool:
        """Whether an element is a plain floating-point number that arithmetic can be done on."""
        return self.dtype in FLOATS or self.dtype in ("F8_E4M3", "F8_E5M2")

    def row_bytes(self) -> int:
        """Bytes a row takes; FormatError where rows of a dtype below 8 bits do not end at bytes."""
        size, odd = divmod(self.matrix[1] * BITS[self.dtype], 8)
        if odd:
            raise FormatError("its rows share bytes, so they cannot be read one by one", found=self)
        return size

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Ref(ABC):
    """A tensor not read yet: a `spec`, and bytes when asked for."""

    spec: Spec

    @abstractmethod
    def rows(self, start: int, stop: int) -> Buffer:
        """The bytes of rows [start, stop)."""

    def read(self) -> Buffer:
        """All bytes."""
        return self.rows(0, self.spec.matrix[0])

    def readinto(self, start: int, stop: int, buffer: memoryview) -> None:
        """Rows [start, stop) into a buffer of exactly their size."""
        buffer[:] = memoryview(self.rows(start, stop)).cast("B")

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
        """All bytes in order, about `size` at a time; a block is valid until the next is asked for."""
        yield from chunks(self.read(), size)

    def reshape(self, *shape: int) -> Ref:
        """The same bytes under another shape of as many elements."""
        return self if shape == self.spec.shape else Reshaped(self, replace(self.spec, shape=shape))

    def as_bytes(self) -> Ref:
        """The same bytes as a vector of bytes, to read any stretch of them."""
        return Reshaped(self, Spec("U8", (self.spec.nbytes,)))

    @property
    def T(self) -> Ref:  # noqa: N802
        """The transpose of a matrix; twice gives the tensor itself."""
        return Transposed(self)


@dataclass(frozen=True)
class InMemory(Ref):
    """A tensor whose bytes are at hand."""

    spec: Spec
    data: Buffer

    def read(self) -> Buffer:
        return self.data

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.data).cast("B")[start * step : stop * step]


@dataclass(frozen=True)
class Reshaped(Ref):
    """Another shape over the same bytes."""

    origin: Ref
    spec: Spec

    def read(self) -> Buffer:
        return self.origin.read()

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read()).cast("B")[start * step : stop * step]

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
        return self.origin.blocks(size)

    def reshape(self, *shape: int) -> Ref:
        return self.origin.reshape(*shape)


class Transposed(Ref):
    """The transpose of a matrix, made when read: for factors and magnitudes, which are small."""

    def __init__(self, origin: Ref) -> None:
        rows, columns = origin.spec.shape
        self.origin, self.spec = origin, replace(origin.spec, shape=(columns, rows))

    def read(self) -> Buffer:
        import numpy as np

        cells = np.frombuffer(self.origin.read(), dtype=f"V{BITS[self.spec.dtype] // 8}")
        return memoryview(np.ascontiguousarray(cells.reshape(self.origin.spec.shape).T).tobytes())

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read())[start * step : stop * step]

    @property
    def T(self) -> Ref:  # noqa: N802
        return self.origin


def origin(ref: Ref) -> Ref:
    """The tensor that a rearranged one is made of."""
    while (inner := getattr(ref, "origin", None)) is not None:
        ref = inner
    return ref


def same_bytes(one: Ref, other: Ref) -> bool:
    """Whether two tensors have the same spec and bytes."""
    return one.spec == other.spec and all(bytes(a) == bytes(b) for a, b in zip(one.blocks(), other.blocks(), strict=True))


def chunks(data: Buffer, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
    """The bytes of `data` in views of at most `size`."""
    view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
    for start in range(0, len(view), size):
        yield view[start : start + size]
