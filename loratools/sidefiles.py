"""The files that lie beside a checkpoint's weights: which of them are copied, which are left out, and why.

spec/checkpoint.md tells the rules. Links to files are followed, as the Hub's cache is made of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, NoReturn

from blake3 import blake3

from loratools.errors import FormatError

WEIGHTS = re.compile(
    r".+\.(safetensors|bin|pt|pth|ckpt|onnx|onnx_data|onnx\.data|gguf|h5|msgpack|npz|ot|tflite|pdparams|mlmodel)(\.index(\.[\w-]+)?\.json)?"
)
RECORD = "unmerge.safetensors"  # what undoes a merge; beside an output that is one file, NAME.unmerge.safetensors
PRIVATE = (".git", ".cache", ".huggingface", "__pycache__", ".ipynb_checkpoints")
STALE = ("other weights or training state, stale beside these", "weights in a folder of their own, not looked at")
_BLOCK = 1 << 20  # what fits the cache: hashing finds it there, where larger blocks took three times as long to read


def beside(folder: Path, known: Container[str] = ()) -> Iterator[tuple[str, str | None]]:
    """Every file of a folder but the `known` ones, relative to it, with the reason it is not copied, if any; a folder ends in '/'."""
    for path, folders, names in os.walk(folder, onerror=_unreadable):
        relative = Path(path).relative_to(folder)
        for name in sorted(folders):
            reason = _folder_reason(Path(path, name), top=relative == Path())
            if reason:
                folders.remove(name)
                yield f"{(relative / name).as_posix()}/", reason
        folders.sort()
        for name in sorted(names):
            shown = (relative / name).as_posix()
            if shown not in known:
                yield shown, _file_reason(Path(path, name), top=relative == Path())


def _folder_reason(path: Path, *, top: bool) -> str | None:
    if path.name in PRIVATE:
        return "version control or cache"
    if path.name == "original" and top:
        return "other weights, stale beside these"
    return "a link to a folder" if path.is_symlink() else None


def _file_reason(path: Path, *, top: bool) -> str | None:
    if not path.is_file():
        return "a link to nothing" if path.is_symlink() else "not a file"
    if WEIGHTS.fullmatch(path.name):
        return STALE[0] if top else STALE[1]
    return None


def copy(source: Path, target: Path, name: str) -> dict[str, Any]:
    """Copy a file's bytes; returns its row for a receipt, under `name`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = blake3(), 0
    with target.open("xb") as sink:
        for block in _blocks(source):
            digest.update(block)
            size += sink.write(block)
    return {"path": name, "bytes": size, "header_sha256": None, "blake3": digest.hexdigest()}


def file_entry(path: Path, name: str) -> dict[str, Any]:
    """A file's row in a receipt: BLAKE3 of its bytes."""
    digest, size = blake3(), 0
    for block in _blocks(path):
        digest.update(block)
        size += len(block)
    return {"path": name, "bytes": size, "header_sha256": None, "blake3": digest.hexdigest()}


def _blocks(path: Path) -> Iterator[memoryview]:
    """The file's bytes, each block good until the next is asked for."""
    try:
        with path.open("rb", buffering=0) as stream:
            room = memoryview(bytearray(min(_BLOCK, os.fstat(stream.fileno()).st_size + 1)))
            while count := stream.readinto(room):
                yield room[:count]
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=path) from error


def _unreadable(error: OSError) -> NoReturn:
    raise FormatError(f"cannot be read: {error.strerror}", file=error.filename) from error
