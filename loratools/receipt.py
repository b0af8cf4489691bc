"""The receipt: what an operation read, did, wrote and left out, written last beside its output.

Its fields and their meaning are in spec/receipt.schema.json.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools import __version__
from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.digests import combined_digest
from loratools.errors import FormatError
from loratools.jsonfile import read_json, write_json
from loratools.needed import RECEIPT
from loratools.sidefiles import file_entry
from loratools.source.handles import name_of, path_of


@dataclass
class Receipt:
    """What one operation did; `tensors` has a row for each changed tensor, `digests` one entry for each of the output."""

    operation: str
    arguments: Mapping[str, Any]
    inputs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    expected: int = 0
    applied: int = 0
    tensors: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    unmerge: dict[str, Any] | None = None
    started: float = field(default_factory=time.monotonic)
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The receipt as plain JSON values, rows and digests in the order of their names."""
        if self.seconds is None:
            self.seconds = round(time.monotonic() - self.started, 3)
        return {
            "loratools": __version__,
            "operation": self.operation,
            "arguments": {name: _plain(value) for name, value in self.arguments.items()},
            "inputs": self.inputs,
            "outputs": sorted(self.outputs, key=lambda entry: str(entry["path"])),
            "digests": dict(sorted(self.digests.items())),
            "expected": self.expected,
            "applied": self.applied,
            "tensors": _plain(sorted(self.tensors, key=lambda row: str(row["name"]))),
            "left_out": _plain(self.left_out),
            "changed_files": self.changed_files,
            "notes": self.notes,
            "seconds": self.seconds,
            "history": self.history,
            **({"unmerge": self.unmerge} if self.unmerge is not None else {}),
        }

    def write(self, path: Path) -> None:
        write_json(path, self.as_json(), indent=1)


def receipt_path(out: Path, *, folder: bool) -> Path:
    """Where the receipt of an output lies: in its folder, or beside its file."""
    return out / RECEIPT if folder else out.parent / f"{out.name}.{RECEIPT}"


def history_of(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The receipts that lie with a checkpoint, or with the models of a pipeline, oldest first: what was done to it before."""
    if checkpoint.single:
        return _history_at(receipt_path(checkpoint.path, folder=False))
    folders = dict.fromkeys([checkpoint.folder, *(part.folder for part in checkpoint.parts.values())])
    return [entry for folder in folders for entry in _history_at(receipt_path(folder, folder=True))]


def adapter_history(adapter: Adapter) -> list[dict[str, Any]]:
    """The receipts that lie with an adapter, in its folder or beside its one file, oldest first."""
    if adapter.path is None:
        return []
    found = _history_at(receipt_path(adapter.path, folder=False)) or _history_at(receipt_path(adapter.path.parent, folder=True))
    written = [entry.get("path") for entry in found[-1].get("outputs", ())] if found else []
    return found if adapter.path.name in written else []  # a folder's receipt may be another file's


def _history_at(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = read_json(path)
    earlier = found.pop("history", [])
    if not isinstance(earlier, list) or not all(isinstance(item, dict) for item in earlier) or "operation" not in found:
        raise FormatError("not a receipt", file=path, remedy="move it away if it belongs to something else")
    return [*earlier, found]


def adapter_inputs(adapter: Adapter) -> list[dict[str, Any]]:
    """A row for each file of an adapter: BLAKE3 of the whole file, for two of one architecture share a header."""
    from loratools.tensorfile import TensorFile

    rows = []
    for path, role in [*((path, "adapter") for path in adapter.files), *((path, "initial") for path in adapter.initial)]:
        header = TensorFile(path).header_sha256 if path.suffix == ".safetensors" else None
        rows.append({**file_entry(path, name_of(path)), "role": role, "header_sha256": header})
    return rows


def checkpoint_input(checkpoint: Checkpoint, role: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """A checkpoint's row: its headers' SHA-256 in the order of its files' names, if all have one, BLAKE3 of its tensors' digests."""
    each = [file.header_sha256 for _, file in sorted(checkpoint.files.items())]
    known = [header for header in each if header is not None]
    headers = hashlib.sha256("".join(known).encode()).hexdigest() if len(each) == len(known) > 1 else each[0]
    headers = headers if len(each) == len(known) else None
    size = sum(file.size for file in checkpoint.files.values())
    return {"path": name_of(checkpoint.path), "role": role, "bytes": size, "header_sha256": headers, "blake3": combined_digest(digests)}


def add_sha256(entries: Iterable[dict[str, Any]], folder: Path | None) -> None:
    """SHA-256 of each file, added to its row; paths are relative to `folder` if given."""
    for entry in entries:
        path = path_of(entry["path"]) if folder is None else folder / entry["path"]
        if path.is_file():
            with path.open("rb") as stream:
                entry["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """A value as JSON has it; inf and nan, which it has not, are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)
