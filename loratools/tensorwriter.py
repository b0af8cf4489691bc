"""A safetensors file written as a stream: the header first, for it is known before any content, then the tensors in any order.

Specification: https://github.com/huggingface/safetensors#format; `tensorfile` reads what is written here.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from blake3 import blake3

from loratools.errors import FormatError
from loratools.flushing import Flushing
from loratools.header import build_header, parse_header
from loratools.refs import Buffer, Spec


class TensorWriter:
    """A safetensors file written as a stream: the header at once, then each tensor's blocks, in any order and from any thread.

    What is written goes to the disk meanwhile; `close` waits for it, and raises if a tensor is missing. The file keeps the order of
    `specs` and gets the mode the umask gives; `header` is one that already says where they lie, to be written as it is.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None, *, header: bytes | None = None
    ) -> None:
        self.path, self.specs = path, dict(specs)
        if header is None:
            header, self._offsets, end = build_header(self.specs, metadata or {})
        else:
            end = sum(spec.nbytes for spec in self.specs.values())
            self._offsets = {name: begin for name, (_, begin) in parse_header(header, end)[0].items()}
        self.digests: dict[str, str] = {}
        self._lock, self._told = threading.Lock(), False
        self.size = 8 + len(header) + end
        self._start = 8 + len(header)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._flushing = Flushing(self._fd)
        _reserve(self._fd, self.size)
        self._put_header(header)

    def _put_header(self, header: bytes) -> None:
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        _write_at(self._fd, memoryview(struct.pack("<Q", len(header)) + header), 0)

    def restate(self, metadata: Mapping[str, str]) -> None:
        """Write the header once more with other metadata, of the same length: where only the tensors' bytes tell what it says."""
        header, _, _ = build_header(self.specs, metadata)
        if 8 + len(header) != self._start:
            raise FormatError("a header of another length", file=self.path, found=len(header), expected=self._start - 8)
        self._put_header(header)

    def write(self, name: str, blocks: Iterable[Buffer]) -> str:
        """Write one tensor from its blocks in order; returns the BLAKE3 of its bytes, in hex."""
        digest, offset = blake3(), self._start + self._offsets[name]
        end = offset + self.specs[name].nbytes
        for block in blocks:
            view = memoryview(block).cast("B")
            if offset + len(view) > end:
                raise FormatError("more bytes than its spec has", file=self.path, tensor=name, expected=self.specs[name])
            digest.update(view)
            _write_at(self._fd, view, offset)
            self._flushing.wrote(len(view))
            offset += len(view)
        if offset != end:
            raise FormatError("fewer bytes than its spec has", file=self.path, tensor=name, found=f"{end - offset} too few")
        self.digests[name] = digest.hexdigest()
        return self.digests[name]

    def when_complete(self, call: Callable[[], object]) -> None:
        """Call once, by whichever thread asks first after the last tensor was written."""
        with self._lock:
            ready = not self._told and len(self.digests) == len(self.specs)
            self._told |= ready
        if ready:
            call()

    def close(self, *, sync: bool = True) -> None:
        """Sync to disk and close, once; raises FormatError if a tensor was never written.

        Without `sync` the last bytes are left to whoever makes the file visible, `output.whole`.
        """
        with self._lock:
            if self._fd < 0:
                return
            self._flushing.finish()
            if sync:
                os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
        missing = self.specs.keys() - self.digests.keys()
        if missing:
            raise FormatError("never written", file=self.path, tensor=min(missing))

    def abandon(self) -> None:
        """Close without syncing, after a failure."""
        if self._fd >= 0:
            self._flushing.stop()
            os.close(self._fd)
            self._fd = -1


def _reserve(fd: int, size: int) -> None:
    """The file's blocks at once where the system can: a full disk is known before any work, and each write finds its place."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
