"""What a reversible merge writes down, from its base and its output: all that `unmerge` needs besides the adapters."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import threads
from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.corrections import corrections, deflated
from loratools.errors import OptionError
from loratools.inverse import Inverse
from loratools.plan import Plan
from loratools.receipt import adapter_inputs, receipt_path
from loratools.record import Spool, record_path
from loratools.refs import BITS, InMemory, Ref, Spec
from loratools.rewrite import Change, Rewritten
from loratools.sidefiles import file_entry
from loratools.source.handles import name_of
from loratools.stream import BLOCK, Applied
from loratools.tensorfile import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

DEAR = 4  # corrections that take more than one byte in so many of the tensor's are weighed against the tensor itself


@dataclass
class Factors:
    """The vectors a delta asks to be kept, in the order it asks: written down, or given back from what was written down.

    float32 for weights of 16 bits and fewer, else float64: the rounding is no matter, as both sides use what is written.
    """

    wide: bool
    data: bytearray = field(default_factory=bytearray)
    given: bool = False
    _at: int = 0

    def __call__(self, make: Callable[[], Tensor]) -> Tensor:
        import torch

        dtype = torch.float64 if self.wide else torch.float32
        if not self.given:
            made = make().to(dtype).contiguous()
            self.data += struct.pack("<Q", made.numel()) + made.numpy().tobytes()
            return made.to(torch.float64)
        (count,) = struct.unpack_from("<Q", self.data, self._at)
        found = torch.frombuffer(self.data, dtype=dtype, count=count, offset=self._at + 8) if count else torch.empty(0, dtype=dtype)
        self._at += 8 + count * dtype.itemsize
        return found.to(torch.float64)


def wide(base: Spec) -> bool:
    return BITS[base.dtype] > 16


@dataclass
class Recording:
    """A merge to be written down: its base, its output as it lies at `place`, and what was done."""

    checkpoint: Checkpoint
    place: Path
    plan: Plan
    changes: Mapping[str, Change]
    added: Mapping[str, Change]
    done: Rewritten
    given: Sequence[tuple[Adapter, float]]
    options: Mapping[str, Any]
    block: int = BLOCK
    sizes: dict[str, int] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, workers: int) -> tuple[Path, dict[str, Any]]:
        """The record beside the output; returns its path, and what the receipt says of it."""
        path = record_path(self.place, folder=not self.checkpoint.single)
        merged, spool = Checkpoint(self.place), Spool(self.place.parent)
        rows: dict[str, dict[str, Any]] = {name: {"base": digest, "merged": digest} for name, digest in self.done.read.items()}
        jobs = [partial(self._tensor, name, change, merged[name], spool, rows[name]) for name, change in self.changes.items()]
        threads.run_all(jobs, workers)
        table = self._table(merged, spool) | {"tensors": rows}
        size = spool.write(path, table)
        base = sum(file.size for file in self.checkpoint.files.values())
        return path, {"path": path.name, "bytes": size, "share": size / base, "whole": sorted(self.whole)}

    def _tensor(self, name: str, change: Change, merged: Ref, spool: Spool, row: dict[str, Any]) -> None:
        source = self.checkpoint[name]
        base, factors = source.spec, Factors(wide(source.spec))
        row["merged"] = self.done.written[name]
        row["kind"] = "+".join(delta.kind for delta, _ in self.plan.changes.get(name, ())) or "copy"
        applied = Applied(source, change.spec, tuple(self.plan.changes.get(name, ())), "cpu", self.block)
        inverse = Inverse(applied, base, merged, factors, source)
        size = spool.put(f"differences/{name}", _differences(inverse, source))
        if size * DEAR > base.nbytes and spool.put(f"whole/{name}", deflated(source)) < size:
            spool.drop(f"differences/{name}")
            with self._lock:
                self.whole.append(name)
            return
        spool.drop(f"whole/{name}")
        if factors.data:
            spool.put(f"factors/{name}", [factors.data])

    def _table(self, merged: Checkpoint, spool: Spool) -> dict[str, Any]:
        checkpoint = self.checkpoint
        for name, file in checkpoint.files.items():
            assert isinstance(file, TensorFile)
            spool.put(f"header/{name}", deflated(InMemory(Spec("U8", (len(file.header),)), file.header)))
        folder = self.place.parent if checkpoint.single else self.place
        return {
            "adapters": [
                {"path": name_of(str(adapter.path)), "strength": strength, "files": [_file(row) for row in adapter_inputs(adapter)]}
                for adapter, strength in self.given
            ],
            "added": {name: self.done.written[name] for name in self.added},
            "beside": [file_entry(folder / name, name) for name in self._copied()],
            "config": checkpoint.config if checkpoint.single else None,
            "expected": self.plan.expected,
            "files": [
                {"name": name, "bytes": file.size, "header_sha256": opened.header_sha256}
                for (name, file), opened in zip(checkpoint.files.items(), merged.files.values(), strict=True)
            ],
            "left_out": [entry["name"] for entry in self.done.left_out],
            "options": dict(self.options),
            "path": name_of(checkpoint.path),
            "restored": self._restored(spool),
            "single": checkpoint.single,
        }

    def _copied(self) -> list[str]:
        copies = [entry["path"] for entry in self.done.files if entry["header_sha256"] is None]
        return [path for path in copies if path not in self.done.changed_files]

    def _restored(self, spool: Spool) -> list[str]:
        """The files kept byte for byte: those the merge edited, and the receipt and record of an earlier one."""
        checkpoint = self.checkpoint
        at = checkpoint.path if checkpoint.single else checkpoint.folder
        earlier = {"receipt": receipt_path(at, folder=not checkpoint.single), "record": record_path(at, folder=not checkpoint.single)}
        kept = {f"file/{name}": checkpoint.folder / name for name in self.done.changed_files}
        kept |= {role: path for role, path in earlier.items() if path.is_file()}
        for name, path in kept.items():
            data = path.read_bytes()
            spool.put(name, deflated(InMemory(Spec("U8", (len(data),)), data)))
        return sorted(kept)


def _differences(inverse: Inverse, source: Ref) -> Iterator[bytes]:
    rows, columns = inverse.rows
    predicted, true = inverse.bind(), source.reshape(rows, columns)
    for segment in inverse.segments():
        pairs = ((data, true.rows(part.start, part.stop)) for part, data in predicted(segment, lambda _: None))
        yield corrections(pairs, inverse.base.dtype)


def _file(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": Path(row["path"]).name, "bytes": row["bytes"], "blake3": row["blake3"]}


def check_recordable(checkpoint: Checkpoint, given: Sequence[tuple[Adapter, float]]) -> None:
    """Raise OptionError for a base that cannot be given back byte for byte, and for an adapter without a file to find it by."""
    if checkpoint.unlike:
        fact, remedy = "--reversible needs a base whose files unmerge can write again", "leave it out and keep the base"
        raise OptionError(fact, file=checkpoint.path, found=checkpoint.unlike, remedy=remedy)
    if not all(adapter.files for adapter, _ in given):
        raise OptionError("--reversible needs adapters that are files", found="one in memory", remedy="save it first")

