"""An output comes whole or not at all: made in a hidden room beside its place, synced, renamed, its folder synced.

Rename is atomic on one file system (POSIX): where OUT is, all of it is. Only a folder that is overwritten is absent for a
moment, between being moved aside and replaced; a crash just then leaves it in the room, and the next run of the same output
puts it back. A room `.NAME.partial-…` holds a lock as long as its process lives, so a run removes those of dead ones alone.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loratools.errors import OutputError


def check_output(out: str | Path, *, overwrite: bool, inputs: Iterable[str | Path] = ()) -> Path:
    """OUT as a path, refused if it exists (unless an empty folder, or overwritten) or overlaps an input.

    What a killed run left beside OUT is cleared first. An index stands for the folder it lies in.
    """
    path = Path(out)
    real = Path(os.path.realpath(out))
    if path.name in ("", ".."):
        path = real
    for item in inputs:
        other = Path(os.path.realpath(item))
        other = other.parent if re.search(r"\.index(\.[\w-]+)?\.json$", other.name) else other
        if real == other or real.is_relative_to(other) or other.is_relative_to(real):
            raise OutputError("is, holds or lies inside the input", file=path, found=str(item), remedy="choose another -o OUT")
    if Path.cwd().is_relative_to(real):
        raise OutputError("is or holds the working folder", file=path, remedy="choose another -o OUT")
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise OutputError("lies below what is no folder", file=path, found=str(above), remedy="choose another -o OUT")
    _clear_stale(path)
    if os.path.lexists(path) and not overwrite and not _empty_folder(path):
        raise OutputError("exists already", file=path, remedy="choose another -o OUT or give --overwrite")
    return path


def _empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path beside OUT to make it at, folder or file; renamed into place at the end, removed on any failure.

    What OUT was before is replaced; that it may be replaced is `check_output`'s to say. Files made beside that path (the
    receipt of an output that is one file) come along, and before it.
    """
    with ExitStack() as leaving:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            room = leaving.enter_context(_room(out))
            yield room / "new" / out.name
            _publish(room, out)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot be written: {error.strerror or error}", file=out) from error


@contextmanager
def _room(out: Path) -> Iterator[Path]:
    """A new folder beside OUT, locked: `new` for what is made, `old` for what it replaces."""
    while True:
        room = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        held = _lock(room, wait=True)
        if room.is_dir():  # else another run took it for a dead one's before it was locked
            break
    try:
        for name in ("new", "old"):
            (room / name).mkdir()
        yield room
    finally:
        _remove(room, held)


def _lock(room: Path, *, wait: bool = False) -> int | None:
    """A descriptor that holds the room's lock until it is closed or its process ends; None where it cannot be had."""
    try:
        held = os.open(room, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another process has it; or this file system knows no locks, and nobody removes its rooms
        os.close(held)
        return None
    return held


def _clear_stale(out: Path) -> None:
    """Remove the rooms that dead runs of the same output left."""
    for room in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        held = _lock(room)
        if held is not None:
            _remove(room, held)


def _remove(room: Path, held: int | None) -> None:
    """Remove a room, first putting back what it had moved aside and nothing replaced; where that fails the room stays."""
    with suppress(OSError):
        for aside in (room / "old").glob("*"):
            if not os.path.lexists(room.parent / aside.name):
                aside.rename(room.parent / aside.name)
        shutil.rmtree(room)
    if held is not None:
        os.close(held)


def _publish(room: Path, out: Path) -> None:
    """Move what was made into place, OUT itself last, what it replaces aside unless rename does both at once."""
    made = room / "new" / out.name
    for path in made.parent.iterdir():
        sync_tree(path)
    with ExitStack() as undo:
        for path in sorted(made.parent.iterdir(), key=lambda path: path == made):
            place = out.parent / path.name
            if os.path.lexists(place) and (path != made or path.is_dir() or place.is_dir()):
                place.rename(room / "old" / path.name)
            path.replace(place)
            undo.callback(place.replace, path)
        undo.pop_all()
    sync_tree(out.parent, below=False)


def sync_tree(path: Path, *, below: bool = True) -> None:
    """Sync a file, or a folder and all `below` it; files that were synced before cost nothing again."""
    if below and path.is_dir():
        for inner in path.iterdir():
            sync_tree(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
