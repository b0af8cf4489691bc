"""unmerge: the base a reversible merge began with, bit for bit, from its output, its record and its adapters.

What the record does not hold is computed: W = round(W′/a − d), corrected where the merge saw that this is not W
(`loratools.inverse`, `loratools.corrections`). Every tensor is held against the digest of the base's own bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from loratools import threads as pool
from loratools.corrections import corrected, inflated, segments
from loratools.digests import weights_entry
from loratools.errors import FormatError, LoratoolsError, OptionError, UsageError
from loratools.inverse import Inverse
from loratools.needed import of_model
from loratools.ops._approximate import approximate as subtract
from loratools.ops._recalled import Recalled, place_of
from loratools.ops._recording import Factors, wide
from loratools.output import check_output, whole
from loratools.pipeline import open_checkpoint
from loratools.receipt import Receipt, adapter_inputs, checkpoint_input, history_of, receipt_path
from loratools.record import Record, record_path
from loratools.refs import Buffer
from loratools.sidefiles import copy, file_entry
from loratools.source import local
from loratools.stream import BLOCK, Applied
from loratools.tensorwriter import TensorWriter


def unmerge(
    merged: str | Path,
    out: str | Path,
    *,
    adapters: str | Path | Sequence[str | Path] = (),
    approximate: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write the checkpoint that `merged` was made from; returns the receipt of the undoing.

    All that one merge put in comes off at once, by the record that `merge --reversible` left; `adapters` are needed only
    where they no longer lie where the merge found them. Where that checkpoint was itself a merge, its receipt and record come
    back with it. `approximate` is for outputs without a record: the adapters (`path:strength`, as they were merged) are
    subtracted, and each row's `off_by` bounds how far from the original a weight can be.

    Raises, before anything is visible at `out`, FormatError for a missing or damaged record and for bytes that are not those
    the merge wrote, naming the tensor; MatchError for adapters that are not the ones it used; NotInvertible from
    `approximate` for changes that cannot be subtracted.

    >>> loratools.unmerge("merged/", "base/")["applied"]  # doctest: +SKIP
    24
    """
    listed = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    target = check_output(out, overwrite=overwrite, inputs=[merged, *(place_of(item) for item in listed)])
    arguments = {"merged": str(merged), "adapters": [str(item) for item in listed], "out": str(out), "approximate": approximate}
    receipt = Receipt("unmerge", arguments | {"overwrite": overwrite, "threads": threads})
    count = threads or pool.default_threads()
    if count < 1:
        raise UsageError("--threads", found=count, expected="at least 1")
    checkpoint = open_checkpoint(local(merged, _files))
    if checkpoint.single and target.suffix != ".safetensors":
        raise OptionError("a model that is one file gives one file", found=target.name, expected="OUT with the ending .safetensors")
    path = record_path(checkpoint.path if checkpoint.single else checkpoint.folder, folder=not checkpoint.single)
    if not path.is_file():
        if approximate:
            return subtract(checkpoint, target, listed, receipt, count)
        remedy = "merge with --reversible, or give --approximate and each --adapter to subtract them"
        raise FormatError("no record to undo a merge by", file=path, remedy=remedy)
    undoing = Undoing(Recalled(checkpoint, Record(path), listed))
    check_output(out, overwrite=overwrite, inputs=[file for adapter, _ in undoing.merge.loaded for file in adapter.files])
    with whole(target) as place, pool.single_threaded_blas():
        undoing.write(place, receipt, count)
        receipt.history = history_of(checkpoint)
        undoing.restore(place, receipt)
    return receipt.as_json()


def _files(path: Path) -> list[Path]:
    """What is downloaded of a repository: the model, and the record of how it was merged."""
    record = record_path(path, folder=path.is_dir())
    return [*of_model(path), *([record] if record.is_file() else [])]


@dataclass
class Undoing:
    """The base's files, written from what a merge recalls, every byte held against its record."""

    merge: Recalled
    block: int = BLOCK
    read: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.merged, self.record, self.table = self.merge.merged, self.merge.record, self.merge.record.table

    def write(self, place: Path, receipt: Receipt, workers: int) -> None:
        """The base's weight files at `place`, every byte held against the record."""
        single = self.merged.single
        if self.merge.loaded:
            self.merge.plan  # noqa: B018  made before threads ask for it
        if not single:
            place.mkdir()
        writers = {}
        try:
            for name, (entries, _) in self.merge.parsed.items():
                specs = {key: spec for key, (spec, _) in entries.items()}
                writers[name] = TensorWriter(place if single else place / name, specs, header=self.merge.headers[name])
            jobs = [partial(self._tensor, writer, name) for writer in writers.values() for name in writer.specs]
            jobs += [partial(self._added, name) for name in self.table["added"]]
            pool.run_all(jobs, workers)
            for writer in writers.values():
                writer.close()
        finally:
            for writer in writers.values():
                writer.abandon()
        for writer in writers.values():
            receipt.outputs.append(weights_entry(writer.path.name, writer.size, writer.header_sha256, writer.digests))
            receipt.digests |= writer.digests
        changed = sorted(name for name in self.merge.specs if self._changed(name))
        receipt.tensors = [{"name": name, "kind": self.table["tensors"][name]["kind"]} for name in changed]
        receipt.expected = receipt.applied = self.table["expected"]
        receipt.inputs = [checkpoint_input(self.merged, "merged", self.read)]
        receipt.inputs += [row for adapter, _ in self.merge.loaded for row in adapter_inputs(adapter)]
        receipt.notes = [f"removed: {name}, which the merge added" for name in sorted(self.table["added"])]
        receipt.notes += [f"not given back, the merge left it out: {name}" for name in self.table["left_out"]]

    def _changed(self, name: str) -> bool:
        return any(f"{kind}/{name}" in self.table["blobs"] for kind in ("differences", "whole"))

    def _tensor(self, writer: TensorWriter, name: str) -> None:
        said, seen = self.table["tensors"][name], blake3()
        try:
            found = writer.write(name, self._blocks(name, seen.update))
        except LoratoolsError as error:
            raise error.at(file=self.record.path, tensor=name) from None
        self._check_read(name, seen.hexdigest(), said["merged"])
        if found != said["base"]:
            # the input was right, so the computation was not
            raise FormatError(
                "what was computed is not the base's tensor", file=self.merged.path, tensor=name,
                found=f"{found[:16]}…", expected=f"{said['base'][:16]}…",
            )  # fmt: skip

    def _added(self, name: str) -> None:
        seen = blake3()
        for block in self.merged[name].blocks():
            seen.update(block)
        self._check_read(name, seen.hexdigest(), self.table["added"][name])

    def _check_read(self, name: str, found: str, expected: str) -> None:
        self.read[name] = found
        if found != expected:
            raise FormatError(
                "not the bytes that the merge wrote", file=self.merged.path, tensor=name,
                found=f"{found[:16]}…", expected=f"{expected[:16]}…",
            )  # fmt: skip

    def _blocks(self, name: str, seen: Any) -> Iterator[Buffer]:
        """The base's bytes; all of the merged tensor's pass through `seen`, in order."""
        merged, blobs = self.merged[name], self.table["blobs"]
        if f"differences/{name}" in blobs and merged.spec.shape == self.merge.specs[name].shape:
            yield from self._predicted(name, seen)
            return
        for block in merged.blocks():
            seen(block)
            if not self._changed(name):
                yield block
        if f"differences/{name}" in blobs:
            yield from self._predicted(name, lambda _: None)
        elif f"whole/{name}" in blobs:
            yield from inflated(self.record.blob(f"whole/{name}"))

    def _predicted(self, name: str, seen: Any) -> Iterator[Buffer]:
        base, merged = self.merge.specs[name], self.merged[name]
        data = self.record.blob(f"factors/{name}").read() if f"factors/{name}" in self.table["blobs"] else b""
        applied = Applied(None, merged.spec, tuple(self.merge.plan.changes.get(name, ()) if self.merge.loaded else ()), "cpu", self.block)
        inverse = Inverse(applied, base, merged, Factors(wide(base), bytearray(data), given=True))
        predicted = inverse.bind()
        kept = segments(self.record.blob(f"differences/{name}").read())
        for segment, found in zip(inverse.segments(), kept, strict=True):
            yield corrected(b"".join(bytes(block) for _, block in predicted(segment, seen)), found, base.dtype)

    # -- what lies beside

    def restore(self, place: Path, receipt: Receipt) -> None:
        """Config, index and the files beside, then the receipt: the base's own where it had one, else that of the undoing."""
        single = self.merged.single
        folder = place.parent if single else place
        for entry in self.table["beside"]:
            row = copy(self.merged.folder / entry["path"], folder / entry["path"], entry["path"])
            if row["blake3"] != entry["blake3"]:
                raise FormatError("not the bytes that the merge wrote", file=self.merged.folder / entry["path"])
            receipt.outputs.append(row)
        ours = {"receipt": receipt_path(place, folder=not single), "record": record_path(place, folder=not single)}
        for name in self.table["restored"]:
            path = ours[name] if name in ours else folder / name.removeprefix("file/")
            with path.open("xb") as stream:
                for block in inflated(self.record.blob(name)):
                    stream.write(block)
            if name != "receipt":
                receipt.outputs.append(file_entry(path, path.name))
        if "receipt" not in self.table["restored"]:
            receipt.write(ours["receipt"])
        else:
            receipt.notes.append("the receipt beside it is the one that it had before")
