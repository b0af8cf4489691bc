"""The record of a merge, by which it is undone: one safetensors file beside the output, defined in spec/unmerge.md.

Its tensors are blobs of bytes; its header's metadata holds one JSON table, the BLAKE3 of that, and the format's version. The
table has the BLAKE3 of each blob, and the header is exactly the one that loratools writes: no bit can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from loratools.errors import FormatError
from loratools.header import build_header
from loratools.refs import Buffer, Ref, Spec
from loratools.sidefiles import RECORD
from loratools.tensorfile import TensorFile
from loratools.tensorwriter import TensorWriter

FORMAT, VERSION = "loratools.unmerge", "1"
_BLOCK = 1 << 20


def record_path(out: Path, *, folder: bool) -> Path:
    """Where the record of an output lies: in its folder, or beside its file."""
    return out / RECORD if folder else out.parent / f"{out.name}.{RECORD}"


class Spool:
    """Blobs on their way into a record, from any thread; they wait in a file without a name, for their sizes come first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._lock = threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        self.digests: dict[str, str] = {}

    def put(self, name: str, parts: Iterable[Buffer]) -> int:
        """Take a blob; returns its size."""
        digest, size = blake3(), 0
        with tempfile.SpooledTemporaryFile(_BLOCK, dir=str(self._folder)) as own:
            for part in parts:
                digest.update(part)
                size += own.write(part)
            own.seek(0)
            with self._lock:
                begin = self._file.seek(0, 2)
                while block := own.read(_BLOCK):
                    self._file.write(block)
                self._places[name], self.digests[name] = (begin, size), digest.hexdigest()
        return size

    def drop(self, name: str) -> None:
        """Forget a blob, if it is there, for which a better one was found."""
        self._places.pop(name, None)
        self.digests.pop(name, None)

    def write(self, path: Path, table: Mapping[str, Any]) -> int:
        """The record itself, its blobs by name; returns its size."""
        text = json.dumps({**table, "blobs": self.digests}, sort_keys=True, separators=(",", ":"))
        metadata = {"format": FORMAT, "version": VERSION, "record": text, "blake3": _digest(text)}
        writer = TensorWriter(path, {name: Spec("U8", (size,)) for name, (_, size) in sorted(self._places.items())}, metadata)
        try:
            for name in writer.specs:
                writer.write(name, self._read(*self._places[name]))
            writer.close()
        finally:
            writer.abandon()
            self._file.close()
        return writer.size

    def _read(self, begin: int, size: int) -> Iterator[bytes]:
        self._file.seek(begin)
        while size:
            block = self._file.read(min(size, _BLOCK))
            size -= len(block)
            yield block


class Record:
    """A record, opened and every byte of it checked. Raises FormatError for one that is not as it was written.

    `table` is its JSON, `blob` a part of it by name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, TensorFile(path)
        try:
            self.table = self._checked()
        except FormatError as error:
            raise error.at(file=path) from None

    def _checked(self) -> dict[str, Any]:
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            raise FormatError("not a record of a merge", found=metadata.get("format"), expected=FORMAT)
        if metadata.get("version") != VERSION:
            found = metadata.get("version")
            raise FormatError("a record of another version", found=found, expected=VERSION, remedy="use another loratools")
        text = metadata.get("record", "")
        specs = {name: ref.spec for name, ref in self._file.items()}
        header = build_header(specs, metadata)[0]
        if metadata.get("blake3") != _digest(text) or hashlib.sha256(header).hexdigest() != self._file.header_sha256:
            raise FormatError("its header is not the one that was written")
        table: dict[str, Any] = json.loads(text)
        blobs = table["blobs"]
        if blobs.keys() != specs.keys():
            raise FormatError("its header is not the one that was written", tensor=min(blobs.keys() ^ specs.keys()))
        for name, ref in self._file.items():
            digest = blake3()
            for block in ref.blocks():
                digest.update(block)
            if digest.hexdigest() != blobs[name] or ref.spec != Spec("U8", (ref.spec.nbytes,)):
                raise FormatError("not the bytes that were written", tensor=name)
        return table

    def blob(self, name: str) -> Ref:
        """A part by its name. Raises FormatError where there is none."""
        if name not in self._file:
            raise FormatError("the record lacks it", file=self.path, tensor=name)
        return self._file[name]


def _digest(text: str) -> str:
    return blake3(text.encode()).hexdigest()
