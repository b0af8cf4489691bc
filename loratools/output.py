"""An output comes whole or not at all: made beside its place, synced, renamed, its folder synced.

Rename is atomic on one file system (POSIX), so a reader sees the old state or the new one, and a crash leaves at most a
hidden `.NAME.partial-…` that the next run of the same output removes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loratools.errors import OutputError


def check_output(out: str | Path, *, overwrite: bool, inputs: Iterable[str | Path] = ()) -> Path:
    """OUT as a path, refused if it exists (unless an empty folder, or overwritten) or overlaps an input."""
    path = Path(out)
    real = path.resolve()
    for item in inputs:
        other = Path(item).resolve()
        if real == other or real.is_relative_to(other) or other.is_relative_to(real):
            raise OutputError("is, holds or lies inside the input", file=path, found=str(item), remedy="choose another -o OUT")
    if (path.exists() or path.is_symlink()) and not overwrite and not _empty_folder(path):
        raise OutputError("exists already", file=path, remedy="choose another -o OUT or give --overwrite")
    return path


def _empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path beside OUT to make it at, folder or file; renamed into place at the end, removed on any failure.

    What OUT was before is replaced; that it may be replaced is `check_output`'s to say. Files made beside that path (the
    receipt of an output that is one file) follow it.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", file=out) from error
    try:
        yield room / out.name
        _publish(room / out.name, out, room)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot be written: {error.strerror or error}", file=out) from error
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _publish(made: Path, out: Path, room: Path) -> None:
    if made.is_dir():
        sync_tree(made)
        if out.is_symlink() or out.exists():
            os.rename(out, room / "replaced")
    elif out.is_dir():
        os.rename(out, room / "replaced")
    companions = [path for path in room.iterdir() if path.is_file() and path != made]
    for path in (made, *companions):
        if path.is_file():
            _sync(path)
        os.replace(path, out.parent / path.name)
    sync_folder(out.parent)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below; files that were synced before cost nothing again."""
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(path, name))
        sync_folder(Path(path))


def sync_folder(folder: Path) -> None:
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
