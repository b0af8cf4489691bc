"""extract: the difference of a fine-tune and its base as an adapter, each matrix by a truncated SVD whose error is certified.

For every tensor both have: equal bytes, nothing to do; a matrix, convolution or embedding that changed becomes B·A; what has
no low-rank form is saved whole, dropped or refused (`rest`); what is left out is listed with its share of the change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.errors import OptionError
from loratools.formats import encode
from loratools.formats.writing import write_container
from loratools.ops._algebra import fill_files
from loratools.ops._extract_options import Options
from loratools.ops._extraction import Extraction, Progress
from loratools.ops._figure import checked
from loratools.ops._pair import Pair
from loratools.output import check_output, whole
from loratools.pipeline import open_checkpoint
from loratools.receipt import Receipt, add_sha256, checkpoint_input, history_of, receipt_path


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    alpha: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rest: str = "save",
    embedding: Sequence[str] = (),
    transposed: Sequence[str] = (),
    exact: bool = False,
    tolerance: float = 1e-4,
    dtype: str | None = None,
    device: str = "cpu",
    format: str = "peft",
    seed: int = 0,
    sha256: bool = False,
    overwrite: bool = False,
    plot: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Extract an adapter from a base checkpoint and its full fine-tune; returns the receipt.

    Ranks follow exactly one of `rank`, `energy` (the share of ‖Δ‖² to keep), `max_error` (‖Δ − BA‖/‖Δ‖ not to exceed) and `size`
    (bytes of the file of weights, as in "40MB"). Factors are float32, balanced, alpha = rank, unless `dtype` and `alpha` say
    otherwise. `rest` is what becomes of changed tensors without a low-rank form: saved whole, dropped and listed, or an error.
    The same bytes come out for any number of threads. `plot` draws to a .png, .svg or .pdf file, as spec/pictures.md tells: twice as
    many singular values are computed for it, and what is extracted is the same. Raises, before anything is visible at `out`,
    MatchError and ShapeError for tensors only one side has or whose shapes differ, QuantizedError, NonFiniteError, OptionError,
    MissingExtra for a picture without matplotlib.

    >>> receipt = extract("base/", "tuned/", "adapter/", rank=8)  # doctest: +SKIP
    >>> max(row["error"] for row in receipt["tensors"])  # doctest: +SKIP
    0.31
    """
    arguments = {name: value for name, value in locals().items() if name not in ("base", "tuned", "out", "progress")}
    options = Options.checked(**{name: arguments[name] for name in Options.GIVEN})
    picture = None if plot is None else checked(plot, [base, tuned], out)
    target = check_output(out, overwrite=overwrite, inputs=[base, tuned])
    receipt = Receipt("extract", {"base": str(base), "tuned": str(tuned), "out": str(out), **arguments})
    pair = Pair(open_checkpoint(base), open_checkpoint(tuned), tuple(include), tuple(exclude), tuple(embedding), tuple(transposed))
    work = Extraction(pair, options, progress, spectra=picture is not None)
    with workers.single_threaded_blas(options.device == "cpu"):
        work.run()
    deltas = {name: change.delta for name, change in work.changes.items() if change.delta is not None}
    if not deltas:
        reasons = ", ".join(sorted({change.reason for change in work.changes.values()}))
        raise OptionError("nothing is left to write", file=pair.tuned.path, found=f"{len(work.changes)} changed tensors: {reasons}")
    adapter = work.adapter(deltas)
    with whole(target) as place:
        receipt.digests = write_container(encode(adapter, format), place)
        _fill(receipt, work, adapter)
        fill_files(receipt, place)
        if sha256:
            add_sha256(receipt.outputs, place if place.is_dir() else place.parent)
            add_sha256(receipt.inputs, None)
        receipt.write(receipt_path(place, folder=place.is_dir()))
        if picture is not None:
            _draw(picture, f"{tuned} beside {base}", work, deltas, receipt.outputs)
    return receipt.as_json()


def _draw(picture: Path, title: str, work: Extraction, deltas: Mapping[str, Delta], outputs: Sequence[Mapping[str, Any]]) -> None:
    """The picture of an extraction, its error over all modules and the size of its file of weights beside the curve."""
    from loratools.ops._page import draw
    from loratools.ops._pictures import extraction_page

    total, missed, size = 0.0, 0.0, sum(row["bytes"] for row in outputs if not row["path"].endswith(".json"))
    for change in work.changes.values():
        total += (change.norm or 0.0) ** 2
        missed += ((change.norm or 0.0) if change.delta is None else change.factored.error if change.factored else 0.0) ** 2
    error = math.sqrt(missed / total) if total else 0.0
    draw(picture, extraction_page(title, work, deltas, error, size))


def _fill(receipt: Receipt, work: Extraction, adapter: Adapter) -> None:
    """What went in, a row for each changed tensor that is represented, what is left out and its share of the change."""
    receipt.inputs = [_input(work, work.pair.base, "base", 0), _input(work, work.pair.tuned, "tuned", 1)]
    here = [change for change in work.changes.values() if change.delta is not None]
    receipt.expected, receipt.applied = len(work.changes), len(here)
    total = sum(change.norm**2 for change in work.changes.values() if change.norm)
    receipt.tensors = [{**change.row(), "share": _share(change.norm, total)} for change in here]
    receipt.left_out = [
        {"name": name, "reason": change.reason, "relative_norm": change.relative_norm, "share": _share(change.norm, total)}
        for name, change in work.changes.items()
        if change.delta is None
    ]
    receipt.left_out += [{"name": name, "reason": reason, "relative_norm": None, "share": None} for name, reason in work.pair.alone.items()]
    receipt.notes = _notes(work, [name for name in adapter if name not in work.changes])
    receipt.history = history_of(work.pair.base)
    receipt.history += [entry for entry in history_of(work.pair.tuned) if entry not in receipt.history]


def _input(work: Extraction, checkpoint: Checkpoint, role: str, side: int) -> dict[str, Any]:
    digests = {name: (found.base, found.tuned)[side] for name, found in work.compared.items()}
    digests |= {name: found for name, both in work.alone.items() if (found := both[side]) is not None}
    return checkpoint_input(checkpoint, role, digests)


def _share(norm: float | None, total: float) -> float | None:
    return None if norm is None or not total else norm**2 / total


def _notes(work: Extraction, beside: Sequence[str]) -> list[str]:
    pair = work.pair
    saved = Counter(change.reason for change in work.changes.values() if isinstance(change.delta, Replacement))
    notes = [f"{checkpoint.path}: {note}" for checkpoint in (pair.base, pair.tuned) for note in checkpoint.notes]
    notes += [f"saved whole: {count} tensors ({reason})" for reason, count in saved.items()]
    if beside:
        notes.append(f"saved too, unchanged, for the format saves whole modules: {', '.join(beside)}")
    tie = work.tied()
    if tie and work.changes[tie[0]].delta is not None:
        notes.append(f"{tie[1]} is tied to {tie[0]}: the change is written for both")
    if "model_type" not in pair.family.config:
        notes.append("no model_type in config.json: matrices are taken to be stored (out, in); --transposed and --embedding say otherwise")
    pairs = {(pair.base[name].spec.dtype, pair.tuned[name].spec.dtype) for name in pair.common}
    notes += [f"the base has {one} where the fine-tune has {other}" for one, other in sorted(pairs) if one != other]
    return notes
