"""A safetensors file: its header without torch, its tensors by blocks of rows, written as a stream.

Specification: https://github.com/huggingface/safetensors#format. A file is `u64 LE n | n bytes of JSON | data`; the JSON maps
names to `{"dtype", "shape", "data_offsets"}` relative to the end of the header, without holes or overlaps.

A `Spec` is a tensor as a header tells it. A `Ref` is a tensor not read yet; here live those that need no torch: in a file,
in memory, reshaped, transposed. All give little-endian bytes in row-major order, rows being the first axis.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from loratools.errors import FormatError, LoratoolsError, raise_all
from loratools.source.handles import Source, open_at

Buffer: TypeAlias = bytes | bytearray | memoryview

# bits an element takes, in the order of the specification's table
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64")
HEADER_LIMIT = 100_000_000
_SIZES = 1 << 60  # beyond what any file holds
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


@dataclass(frozen=True)
class InFile(Ref):
    """A tensor in an open safetensors file, `offset` bytes from its start."""

    path: Path
    handle: Source
    offset: int
    spec: Spec

    def read(self) -> Buffer:
        buffer = bytearray(self.spec.nbytes)
        self._fill(memoryview(buffer), 0)
        return buffer

    def rows(self, start: int, stop: int) -> Buffer:
        buffer = bytearray((stop - start) * self.spec.row_bytes())
        self.readinto(start, stop, memoryview(buffer))
        return buffer

    def readinto(self, start: int, stop: int, buffer: memoryview) -> None:
        self._fill(buffer, start * self.spec.row_bytes())

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
        view = memoryview(bytearray(min(size, self.spec.nbytes)))
        for start in range(0, self.spec.nbytes, size):
            part = view[: min(size, self.spec.nbytes - start)]
            self._fill(part, start)
            yield part

    def reshape(self, *shape: int) -> Ref:
        return replace(self, spec=replace(self.spec, shape=shape))

    def as_bytes(self) -> Ref:
        return replace(self, spec=Spec("U8", (self.spec.nbytes,)))

    def _fill(self, buffer: memoryview, start: int) -> None:
        try:
            count = self.handle.readinto(buffer, self.offset + start)
        except LoratoolsError as error:
            raise error.at(file=self.path) from None
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", file=self.path) from error
        if count != len(buffer):
            raise FormatError("the file became shorter while it was read", file=self.path)


def origin(ref: Ref) -> Ref:
    """The tensor that a rearranged one is made of."""
    while (inner := getattr(ref, "origin", None)) is not None:
        ref = inner
    return ref


def identity(ref: Ref) -> tuple[int, int]:
    """What is equal for two views of one stored tensor, and for no two tensors."""
    found = origin(ref)
    return (id(found.handle), found.offset) if isinstance(found, InFile) else (id(found), -1)


def file_of(ref: Ref) -> Path | None:
    """The file a tensor lies in, if any."""
    found = origin(ref)
    joined = getattr(found, "parts", ())
    return found.path if isinstance(found, InFile) else file_of(joined[0]) if joined else None


class WeightFile(Mapping[str, Ref]):
    """An opened file of weights: its tensors by name, and what a receipt says of it."""

    def __init__(
        self, path: Path, size: int, refs: Mapping[str, Ref], metadata: Mapping[str, str] | None = None, header_sha256: str | None = None
    ) -> None:
        self.path, self.size, self.metadata, self.header_sha256 = path, size, metadata or {}, header_sha256
        self._refs = refs

    def with_tensors(self, refs: Mapping[str, Ref]) -> WeightFile:
        """The file under other tensors than it stores: some left out, or read in another way."""
        return WeightFile(self.path, self.size, refs, self.metadata, self.header_sha256)

    def __getitem__(self, name: str) -> Ref:
        return self._refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)


class TensorFile(WeightFile):
    """A safetensors file opened from its header: names to `Ref`s in the order of their bytes.

    Raises FormatError (or Faults of several), naming the file, for every header the specification forbids.
    """

    header_sha256: str

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._handle = open_at(self.path)
            self.size = self._handle.size
            header = self._header()
            entries, self.metadata = parse_header(header, self.size - 8 - len(header))
        except LoratoolsError as error:
            raise error.at(file=self.path) from None
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", file=self.path) from error
        self.header = header
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        start = 8 + len(header)
        self._refs = {name: InFile(self.path, self._handle, start + begin, spec) for name, (spec, begin) in entries.items()}

    def _header(self) -> bytes:
        length = memoryview(bytearray(8))
        if self._handle.readinto(length, 0) != 8:
            raise FormatError("not a safetensors file: shorter than the 8 bytes of its header's length", found=f"{self.size} bytes")
        (count,) = struct.unpack("<Q", length)
        if count > HEADER_LIMIT:
            remedy = "it is a pointer of Git LFS: run git lfs pull" if bytes(length) == b"version " else None
            raise FormatError("not a safetensors file: no header's length at its start", found=bytes(length), remedy=remedy)
        if count > self.size - 8:
            raise FormatError(
                "truncated: the header goes past the end of the file", found=f"{self.size} bytes", expected=f"{8 + count} or more"
            )
        header = bytearray(count)
        self._handle.readinto(memoryview(header), 8)
        return bytes(header)


def parse_header(header: bytes, data_bytes: int) -> tuple[dict[str, tuple[Spec, int]], dict[str, str]]:
    """The header's tensors as name → (spec, begin) in the order of their bytes, and its metadata; every fault is collected."""
    if header[:1] != b"{":
        raise FormatError("not a safetensors file: the header does not begin with '{'")
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header is not JSON: {error}") from None
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null, which safetensors' own reader takes for none
    if not isinstance(metadata, dict) or not all(_text(part) for pair in metadata.items() for part in pair):
        raise FormatError("the header's __metadata__ must map strings to strings")
    faults: list[LoratoolsError] = []
    entries = {}
    for name, entry in table.items():
        try:
            if not _text(name):
                raise FormatError("a name that is not Unicode text")
            entries[name] = _entry(entry)
        except FormatError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    ordered = sorted(entries.items(), key=lambda item: item[1][1:])
    end = 0
    for name, (_, begin, stop) in ordered:
        if begin != end:
            raise FormatError("data_offsets leave a hole or overlap", tensor=name, found=begin, expected=end)
        end = stop
    if end != data_bytes:
        lacking = "truncated: the file ends before its tensors do" if end > data_bytes else "bytes after the last tensor"
        raise FormatError(lacking, found=f"{data_bytes} bytes of data", expected=end)
    return {name: (spec, begin) for name, (spec, begin, _) in ordered}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError("the header names something twice", tensor=twice)
    return table


def _entry(entry: Any) -> tuple[Spec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("a header entry needs exactly dtype, shape and data_offsets", found=json.dumps(entry)[:80])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError("unknown dtype", found=json.dumps(dtype), expected="one of " + " ".join(BITS))
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError("shape and data_offsets must be lists of natural numbers", found=f"{shape}, {offsets}"[:80])
    count = 1
    for size in shape:
        count *= size
        if count >= _SIZES:
            raise FormatError("its shape has more elements than a file can hold", found=f"{shape}"[:80])
    spec = Spec(dtype, tuple(shape))
    bits = spec.numel * BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise FormatError(
            "data_offsets do not fit dtype and shape", found=f"{offsets[1] - offsets[0]} bytes", expected=f"{bits / 8:g} for {spec}"
        )
    return spec, offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _SIZES for value in values)


def _text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON's escapes can spell half a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def same_bytes(one: Ref, other: Ref) -> bool:
    """Whether two tensors have the same spec and bytes."""
    return one.spec == other.spec and all(bytes(a) == bytes(b) for a, b in zip(one.blocks(), other.blocks(), strict=True))


def chunks(data: Buffer, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
    """The bytes of `data` in views of at most `size`."""
    view = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
    for start in range(0, len(view), size):
        yield view[start : start + size]
