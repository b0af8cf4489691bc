"""Open files read at positions: on disk, or, for the paths that stand for files of a repository, by range; and what they are called.

A path stands for something else only while it is registered here: a placeholder in a `view`, for as long as that lasts, and
what was downloaded, whose name in messages and receipts is the repository's rather than the cache's.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from loratools.errors import FormatError, SourceError, name_files_by


class Source(ABC):
    """Bytes of a known `size` that are read at positions."""

    size: int

    @abstractmethod
    def readinto(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer from `offset` on; returns how many bytes there were."""


class Handle(Source):
    """An open file descriptor, read at positions from any thread, closed with its last user."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("not a file", file=path, found="a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device")
        self.size = status.st_size

    def readinto(self, buffer: memoryview, offset: int) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Placeholder(ABC):
    """What stands behind a path that is registered: a file elsewhere."""

    size: int

    @abstractmethod
    def whole(self) -> bytes:
        """All bytes, for a small file such as a config."""

    @abstractmethod
    def header(self) -> Source:
        """The file to read a header from."""


_PLACEHOLDERS: dict[str, Placeholder] = {}
_NAMES: dict[str, str] = {}
_LACKING: dict[str, tuple[str, ...]] = {}


class NotFetched(SourceError):
    """Data that lie beyond what was fetched with the header."""


def open_at(path: Path) -> Source:
    """The file at a path, opened. Raises OSError, FormatError for what is no file, SourceError from the Hub."""
    found = _PLACEHOLDERS.get(os.fspath(path))
    return found.header() if found is not None else Handle(path)


def read_whole(path: Path) -> bytes:
    """All bytes of a small file."""
    found = _PLACEHOLDERS.get(os.fspath(path))
    return found.whole() if found is not None else path.read_bytes()


def size_at(path: Path) -> int:
    """A file's size in bytes."""
    found = _PLACEHOLDERS.get(os.fspath(path))
    return found.size if found is not None else path.stat().st_size


def check_on_disk(path: Path) -> None:
    """Raise SourceError for a path that stands for a file elsewhere, where its header alone would not do."""
    if os.fspath(path) in _PLACEHOLDERS:
        raise SourceError("only headers of safetensors files are read from afar", file=path, remedy="--values downloads it first")


def register(placeholders: dict[str, Placeholder]) -> None:
    _PLACEHOLDERS.update(placeholders)


def forget(placeholders: dict[str, Placeholder]) -> None:
    for path in placeholders:
        _PLACEHOLDERS.pop(path, None)


def call(root: Path, name: str, lacking: Iterable[str] = ()) -> None:
    """Let a folder, and all that lies in it, be called by a repository's name; it may lack files that the repository has."""
    _NAMES[os.fspath(root)] = name
    _LACKING[os.fspath(root)] = tuple(lacking)


def lacking(folder: Path) -> list[str]:
    """The files of a repository's folder that were not downloaded, relative to it."""
    for root in (folder, *folder.parents):
        if (names := _LACKING.get(os.fspath(root))) is not None:
            paths = [root / name for name in names]
            return [path.relative_to(folder).as_posix() for path in paths if folder in path.parents and not path.exists()]
    return []


def name_of(path: str | Path) -> str:
    """What a path is called in receipts and messages: the repository, commit and file it was downloaded from, or itself."""
    for root in (Path(path), *Path(path).parents):
        if (name := _NAMES.get(os.fspath(root))) is not None:
            inner = Path(path).relative_to(root).as_posix()
            return name if inner == "." else f"hf://{name}/{inner}"
    return str(path)


name_files_by(name_of)


def path_of(name: str) -> Path:
    """Where what has this name lies on disk: the inverse of `name_of`."""
    for root, known in _NAMES.items():
        if name == known:
            return Path(root)
        if name.startswith(f"hf://{known}/"):
            return Path(root, name.removeprefix(f"hf://{known}/"))
    return Path(name)
