"""A safetensors file: its header without torch, its tensors by blocks of rows; `tensorwriter` writes what is read here."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.errors import FormatError, LoratoolsError
from loratools.header import HEADER_LIMIT, parse_header
from loratools.refs import BLOCK_BYTES, Buffer, Ref, Spec, origin
from loratools.source.handles import Source, open_at


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
