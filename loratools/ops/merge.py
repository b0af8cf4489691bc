"""merge: a base with adapters in it, streamed: each weight read once, changed in float64, rounded once, written.

    W′ = W + Σ sᵢ·(applyᵢ(W) − W)

for adapters applied at strengths sᵢ: one at strength 1 is exactly its own W′, one at 0 leaves the base's bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from loratools import threads
from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.errors import OptionError, UsageError
from loratools.formats import load
from loratools.formats.base import read_options
from loratools.formats.reading import DEFAULTS, Reading, arguments, paths, reads
from loratools.ops._recording import Recording, check_recordable
from loratools.output import check_output, whole
from loratools.pipeline import open_checkpoint
from loratools.plan import Plan, changes_of
from loratools.planning import make_plan, split_renames, split_strength
from loratools.receipt import Receipt, adapter_inputs, add_sha256, checkpoint_input, history_of, receipt_path
from loratools.record import record_path
from loratools.rewrite import Change, Rewritten
from loratools.sidefiles import file_entry
from loratools.statistics import Statistics
from loratools.tensors import dtype_code

# the words that decide what an adapter means, kept with a record so that it can be read again
REPLAYED = (
    "untie", "rename", "allow_unmatched", *DEFAULTS,
)  # fmt: skip


@reads
def merge(
    base: str | Path,
    adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
    out: str | Path,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    untie: bool = False,
    dequantize: bool = False,
    rename: Sequence[str] = (),
    allow_unmatched: bool = False,
    full_report: bool = False,
    reversible: bool = False,
    sha256: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Merge adapters (`path` or `path:strength`) into a base checkpoint; returns the receipt.

    Every tensor keeps its dtype unless `dtype` names another. Raises, before anything is visible at `out`, MatchError for
    deltas the base lacks, ShapeError, QuantizedError, NonFiniteError for a weight that overflows, UnsupportedError for a
    delta on a tied tensor without `untie`. `dequantize` merges onto a plain copy of a base in fp8 or in bitsandbytes' 4 bits, in
    `dtype` or the one its quantiser names; without it every quantised base is refused. `reversible` writes beside the output
    the record by which `unmerge` gives the base back bit for bit (spec/unmerge.md). `progress` is told (bytes written, bytes
    to write), from several threads in turn.

    >>> receipt = merge("base/", ["adapter/", "style/:0.5"], "out/")  # doctest: +SKIP
    >>> receipt["applied"] == receipt["expected"]  # doctest: +SKIP
    True
    """
    words = arguments(locals(), "base", "adapters", "out", "progress")
    listed = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    given = [split_strength(item) for item in listed]
    target = check_output(out, overwrite=overwrite, inputs=paths(reading, [item for item, _ in given], base))
    receipt = Receipt("merge", {"base": str(base), "adapters": [_label(item) for item in listed], "out": str(out), **words})
    options = read_options(words)
    code = dtype_code(dtype) if dtype else None
    checkpoint = open_checkpoint(base)
    if dequantize:
        checkpoint = checkpoint.dequantized(code)
    loaded = [(item if isinstance(item, Adapter) else load(item, options=options), strength) for item, strength in given]
    plan = make_plan(
        checkpoint, loaded, untie=untie, renames=split_renames(rename), allow_unmatched=allow_unmatched,
        transposed=tuple(reading["transposed"]), embeddings=tuple(reading["embedding"]),
    )  # fmt: skip
    if dequantize and not checkpoint.computed:
        plan.notes.append("nothing to dequantise: the base is not quantised")
    if reversible:
        check_recordable(checkpoint, loaded)
    statistics: dict[str, Statistics] = {}
    changes, added = changes_of(checkpoint, plan, statistics, dtype=code, device=device, full=full_report)
    if code:
        for prefix, part in checkpoint.parts.items():
            plan.config |= {prefix + key: _TORCH[code] for key in ("torch_dtype", "dtype") if key in part.config}
    with whole(target) as place:
        done = _rewrite(checkpoint, place, changes, added, plan, device, threads, progress)
        if reversible:
            kept = {name: str(words[name]) if isinstance(words[name], Path) else words[name] for name in REPLAYED}
            receipt.unmerge = _record(Recording(checkpoint, place, plan, changes, added, done, loaded, kept), threads)
        else:
            _note_lost_record(checkpoint, done)
        _fill(receipt, checkpoint, [adapter for adapter, _ in loaded], plan, statistics, done)
        if sha256:
            add_sha256(receipt.outputs, place.parent if checkpoint.single else place)
            add_sha256(receipt.inputs, None)
        receipt.write(receipt_path(place, folder=not checkpoint.single))
    return receipt.as_json()


_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _label(item: str | Path | Adapter) -> str:
    return f"<adapter of {len(item)} deltas>" if isinstance(item, Adapter) else str(item)


def _rewrite(
    checkpoint: Checkpoint,
    place: Path,
    changes: Mapping[str, Change],
    added: Mapping[str, Change],
    plan: Plan,
    device: str,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> Rewritten:
    count = workers or (1 if device != "cpu" else threads.default_threads())
    if count < 1:
        raise UsageError("--threads", found=count, expected="at least 1")
    if checkpoint.single and place.suffix != ".safetensors":
        raise OptionError("a base that is one file gives one file", found=place.name, expected="OUT with the ending .safetensors")
    if not checkpoint.single and place.suffix == ".safetensors":
        raise OptionError("a base that is a folder gives a folder", found=place.name, expected="OUT without the ending .safetensors")
    with threads.single_threaded_blas(device == "cpu"):
        return checkpoint.rewrite(place, changes, added=added, config=plan.config, workers=count, progress=progress)


def _record(recording: Recording, workers: int | None) -> dict[str, Any]:
    """Write the record of the merge; returns what the receipt says of it."""
    with threads.single_threaded_blas():
        path, told = recording.write(workers or threads.default_threads())
    recording.done.files.append(file_entry(path, path.name))
    return told


def _note_lost_record(checkpoint: Checkpoint, done: Rewritten) -> None:
    folders = {"": checkpoint.folder} | {prefix.replace(".", "/"): part.folder for prefix, part in checkpoint.parts.items() if prefix}
    paths = {place: record_path(folder, folder=True) for place, folder in folders.items()}
    if checkpoint.single:
        paths = {"": record_path(checkpoint.path, folder=False)}
    copied = {entry["path"] for entry in done.files}  # with a model of a pipeline that did not change
    for place, path in paths.items():
        if path.is_file() and place + path.name not in copied:
            reason = "what undoes an earlier merge, not this one; --reversible would carry it on"
            done.left_out.append({"name": place + path.name, "reason": reason, "relative_norm": None})


def _fill(
    receipt: Receipt, checkpoint: Checkpoint, adapters: Sequence[Adapter], plan: Plan, statistics: Mapping[str, Statistics], done: Rewritten
) -> None:
    receipt.inputs = [checkpoint_input(checkpoint, "base", done.read)] + [row for adapter in adapters for row in adapter_inputs(adapter)]
    receipt.outputs, receipt.digests = done.files, done.written
    receipt.expected = plan.expected
    receipt.applied = plan.without_effect + sum(statistic.applied for statistic in statistics.values())
    receipt.tensors = [statistic.row(name) for name, statistic in statistics.items()]
    receipt.left_out, receipt.changed_files, receipt.notes = done.left_out, done.changed_files, checkpoint.notes + done.notes + plan.notes
    reason = "changes no weight, such as a textual inversion: it stays in the adapter"
    names = [name for adapter in adapters for name in adapter.passengers]
    receipt.left_out = receipt.left_out + [{"name": name, "reason": reason, "relative_norm": None} for name in names]
    receipt.history = history_of(checkpoint)
