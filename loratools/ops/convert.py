"""convert: an adapter in another format, or its deltas as another kind: LoRA, DoRA, a dense difference, the other axis.

A change of format alone goes by way of the deltas and touches no factor: the same bytes come out. A change of kind keeps W′ where the
new kind can say it, and states how far off it is, beside the best there is, where it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.formats import encode
from loratools.formats.base import read_options
from loratools.formats.reading import Reading, arguments, paths, reads
from loratools.formats.writing import write_container
from loratools.ops._algebra import fill_files, format_of, label, loaded
from loratools.ops._base import Base
from loratools.ops._convert_options import Options
from loratools.ops._converting import Conversion
from loratools.ops._layout import layout_for, stacked
from loratools.ops._saved import with_biases
from loratools.output import check_output, whole
from loratools.planning import split_renames
from loratools.receipt import Receipt, adapter_history, add_sha256, receipt_path


@reads
def convert(
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    format: str | None = None,
    kind: str | None = None,
    magnitude_axis: str | None = None,
    layout: str | None = None,
    network: str | None = None,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    rename: Sequence[str] = (),
    sha256: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Write an adapter in another format, or as another kind; returns the receipt.

    Without `kind` and `magnitude_axis` every tensor keeps its bytes. `kind` "lora" writes each W′ − W as factors: exact where it is a
    product of small rank (LoHa, LoKr, …), else the best of `rank`, or of the least rank within `energy` or `max_error`; "dora" gives
    each difference the magnitudes ‖W + ΔW‖ in float32, so that W′ stays; "dense" writes W′ − W itself. `magnitude_axis` ("out": one
    for each output, peft's; "in": one for each input) refits DoRA along that axis. `base` is the checkpoint the adapter belongs to,
    needed wherever W decides. `layout` gives the tensors of a diffusion network (Flux, SD3, Stable Diffusion, Wan, …) the names of
    "diffusers", or "original", their authors' (BFL, mmdit, LDM, …), by a table that needs no base; without it a format that has the names
    of one of them alone gets those. `network`, such as "flux", tells which it is where its names are those of several.

    Raises, before anything is visible at `out` and all together, UnsupportedError and OptionError for what cannot be done so,
    NotExpressible for what the format cannot say, MatchError and AmbiguousError for names whose layout is not known or left open, and what
    reading and `Adapter.resolve` raise.

    >>> receipt = convert("dora/", "plain/", kind="lora", base="base/", rank=16)  # doctest: +SKIP
    >>> max(row["error"] / row["optimal_error"] for row in receipt["tensors"])  # doctest: +SKIP
    1.00003
    """
    words = arguments(locals(), "adapter", "out")
    options = Options.checked(**{name: words[name] for name in Options.GIVEN})
    target = check_output(out, overwrite=overwrite, inputs=paths(reading, [adapter], base))
    receipt = Receipt("convert", {"adapter": label(adapter), "out": str(out), **words})
    if rename and base is None:
        raise UsageError("--rename maps names to a base's", found="no --base")
    given = loaded(adapter, read_options(reading))
    on = None if base is None else Base(base, reading)
    source = given if on is None else stacked(given.resolve(on.specs, on.family, renames=split_renames(rename)), on.specs)
    written = format_of(format or ("loratools" if kind == "dense" else None), given)
    source, whole_modules = with_biases(source, on) if written == "peft" else (source, [])
    relayout, said = layout_for(source, written, layout, None if on is None else on.specs, network)
    work, count = Conversion(source, on, options), options.threads
    with workers.single_threaded_blas(options.device == "cpu"):
        if options.changes:
            work.run()
        made = work.adapter() if options.changes else source
        laid = made if relayout is None else made.relaid(relayout)
        with whole(target) as place:
            encoded = encode(laid, written)
            receipt.digests = write_container(encoded, place)
            fill_files(receipt, place, [given])
            receipt.inputs += [on.input(count)] if on is not None else []
            told = [*source.notes, *work.notes(), *([said] if said else []), *whole_modules, *encoded.notes]
            receipt.tensors, receipt.notes = work.rows(), told
            receipt.expected, receipt.applied = len(source), len(made)
            receipt.history = adapter_history(given)
            if sha256:
                add_sha256(receipt.outputs, place if place.is_dir() else place.parent)
                add_sha256(receipt.inputs, None)
            receipt.write(receipt_path(place, folder=place.is_dir()))
    return receipt.as_json()
