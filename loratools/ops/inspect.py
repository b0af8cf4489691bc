"""inspect: what an adapter or a checkpoint holds, told from headers; from its data where asked.

Parameters are elements of the tensors on disk, and the share of the base is peft's `print_trainable_parameters`:
100 · adapter / (base + adapter).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Unpack

from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.errors import FormatError, OptionError
from loratools.facts import facts_of
from loratools.families import Family
from loratools.formats import FORMATS, load
from loratools.formats._pieces import as_stored
from loratools.formats.base import CONFIG, read_options
from loratools.formats.opening import is_adapter, open_container
from loratools.formats.reading import Reading, paths, reads
from loratools.ops._drift import moved
from loratools.ops._figure import checked
from loratools.ops._oddities import as_a_whole, faulty_values, odd_scaling, scan, settings, unfetched
from loratools.ops._spectrum import spectrum
from loratools.pipeline import open_checkpoint
from loratools.refs import Ref
from loratools.source import headers
from loratools.source.handles import size_at
from loratools.weightfiles import PIPELINE, SINGLE, holds_model, is_index

_ADAPTER_KEY = re.compile(r"lora_|\.lora\.|hada_w|lokr_w|oft_|dora_scale|^unet:\d+:|^w_[ab]_\d")


@reads
def inspect(
    path: str | Path,
    *,
    base: str | Path | None = None,
    values: bool = False,
    spectra: bool = False,
    plot: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """What a file or folder holds, as plain JSON values; spec/cli.md names the fields.

    Only headers are read, without torch, unless `values` (zero factors, non-finite values) or `spectra` (singular values and norms,
    which implies `values`) ask for the data. `base` joins the adapter's names and shapes with a checkpoint's; of a DoRA it is read,
    to tell how far the magnitudes moved from the base's norms and which norms they fit. `plot` draws to a .png, .svg or .pdf file, as
    spec/pictures.md tells, and implies `spectra`. With `spectra` and `base` every weight that the adapter changes is read, to tell
    each change's share of it; `progress` is told (bytes of them done, bytes in all). Raises what reading raises, OptionError for
    `base`, `spectra` or `plot` on a checkpoint and for a picture of nothing, MissingExtra without matplotlib.

    >>> inspect("adapter/", base="base/")["trainable_percent"]  # doctest: +SKIP
    0.06
    """
    target = None if plot is None else checked(plot, paths(reading, [path], base))
    values, spectra = values or target is not None, spectra or target is not None
    with headers(path) as place:
        report = _told(path if values or spectra else place, place, base, values, spectra, target, progress, reading)
    return report | {"path": str(path)}


def _told(
    path: str | Path, seen: Path, base: str | Path | None, values: bool, spectra: bool, target: Path | None,
    progress: Callable[[int, int], None] | None, reading: Reading,
) -> dict[str, Any]:  # fmt: skip
    """The report on what lies at `path`; `seen` is where its headers can be read, as those of `base`."""
    if not seen.exists():
        raise FormatError("no such file or folder", file=seen)
    if not holds_adapter(seen):
        words = {"--base": base, "--plot": target, "--spectra": spectra, "--alpha-in": reading["alpha_in"], "--initial": reading["initial"]}
        wrong = [word for word, given in words.items() if given not in (None, False)]
        if wrong:
            raise OptionError(f"{wrong[0]} is for adapters, and this is a checkpoint", file=seen)
        return _checkpoint(open_checkpoint(path), values=values)
    adapter = load(path, options=read_options(reading))
    globs = Family({}, tuple(reading["embedding"]), tuple(reading["transposed"]))
    with nullcontext(base) if base is None or values or spectra else headers(base) as below:
        checkpoint = open_checkpoint(below) if below is not None else None
        return _adapter(adapter, seen, checkpoint, globs, values, spectra, target, progress)


def holds_adapter(path: Path) -> bool:
    """Whether a path is to be read as an adapter: what a format claims, and what can only be a broken or unknown adapter."""
    if path.is_dir():
        return is_adapter(path) or holds_folders(path)
    if path.name in SINGLE or is_index(path.name):
        return False
    if path.suffix == ".json":
        return path.name == CONFIG
    container = open_container(path)
    marked = sum(_ADAPTER_KEY.search(key) is not None for key in container.tensors)
    return any(row.detect(container) for row in FORMATS) or marked > len(container.tensors) / 2


def holds_folders(path: Path) -> bool:
    """Whether it is no model, and adapters lie in its folders, one of which must be named."""
    return any(path.glob(f"*/{CONFIG}")) and not (path / PIPELINE).is_file() and not holds_model(path)


# -- an adapter


def _adapter(
    adapter: Adapter, path: Path, base: Checkpoint | None, family: Family, values: bool, spectra: bool, target: Path | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:  # fmt: skip
    warnings = as_a_whole(adapter) + unfetched(adapter)
    weights: Mapping[str, Ref] = {}
    asked, drift = adapter, dict[str, list[float]]()
    if base is not None:
        adapter, weights, more = _joined(adapter, base, family)
        warnings += more
    warnings += adapter.notes
    rows = {name: facts_of(name, delta, weights[name].spec if name in weights else None) for name, delta in adapter.items()}
    for name, delta in adapter.items():
        warnings += [f"{name}: {text}" for text in odd_scaling(delta)]
        if adapter.pending is not None:  # rows in an order that waits for the base: no norm and no singular value is of it
            delta = delta.map(as_stored)
        if values or spectra:
            warnings += [f"{name}: {text}" for text in faulty_values(delta)]
        if spectra:
            rows[name] |= spectrum(delta)
        if base is not None and not base.quantization:
            found = moved(delta, weights.get(name))
            rows[name] |= found.told
            warnings += [f"{name}: {text}" for text in found.odd]
            drift |= {name: found.each} if found.each else {}
    if spectra and base is not None:
        from loratools.ops._beside import on_base

        norms, odd = on_base(adapter, base, weights, rows, progress)
        rows, warnings = {name: row | norms[name] for name, row in rows.items()}, warnings + odd
    if target is not None:
        _draw(target, str(path), asked, adapter, rows, drift, on_base=base is not None and not base.quantization)
    base_parameters = sum(spec.numel for spec in base.specs.values()) if base is not None else None
    return {
        "path": str(path),
        "format": adapter.format,
        "kinds": dict(Counter(row["kind"] for row in rows.values())),
        "base_model": settings(adapter).get("base_model_name_or_path"),
        "modules": list(rows.values()),
        "modules_total": len(rows),
        "parameters": adapter.parameters,
        "base_parameters": base_parameters,
        "trainable_percent": 100 * adapter.parameters / (base_parameters + adapter.parameters) if base_parameters is not None else None,
        "bytes": sum(size_at(file) for file in adapter.files if file.suffix != ".json"),
        "ranks": {str(rank): count for rank, count in sorted(Counter(row["rank"] for row in rows.values() if row["rank"]).items())},
        "values_checked": values or spectra,
        "warnings": warnings,
    }


def _draw(
    target: Path, title: str, asked: Adapter, joined: Adapter, rows: Mapping[str, Any], drift: Mapping[str, list[float]], *, on_base: bool
) -> None:
    """The picture of an adapter; its changes are shares of the weights where a base has these in numbers."""
    from loratools.ops._page import draw
    from loratools.ops._pictures import adapter_page

    draw(target, adapter_page(title, asked, joined, rows, drift, on_base=on_base))


def _joined(adapter: Adapter, base: Checkpoint, globs: Family) -> tuple[Adapter, dict[str, Ref], list[str]]:
    """The adapter under the base's names, the weights they meet, and what a merge of the two would stumble over."""
    family = base.family(globs.more_embeddings, globs.more_transposed)
    ties, weights, warnings = family.ties(base), dict(base), list[str]()
    for embedding, head in ties:
        weights.setdefault(head, weights[embedding])
    joined = adapter.resolve({name: ref.spec for name, ref in weights.items()}, family)
    if base.quantization:
        warnings.append(f"the base is quantised ({base.quantization}): {_refused(base)}, and its parameters are counted as stored")
    for tied in ties:
        touched = [name for name in tied if name in joined]
        if len(touched) == 1 and not joined[touched[0]].follows_tie:
            other = tied[1 - tied.index(touched[0])]
            warnings.append(f"{touched[0]} is changed alone, and tied to {other} in the base: merge needs --untie")
    return joined, weights, warnings


def _refused(base: Checkpoint) -> str:
    return "merge takes it with --dequantize alone" if base.dequantizable else "merge refuses it"


# -- a checkpoint


def _checkpoint(checkpoint: Checkpoint, *, values: bool) -> dict[str, Any]:
    specs, warnings = checkpoint.specs, list(checkpoint.notes)
    if checkpoint.quantization:
        told = _refused(checkpoint)
        warnings.append(f"its weights are quantised ({checkpoint.quantization}): {told}, and parameters are counted as stored")
    strays = [name for name in specs if _ADAPTER_KEY.search(name)]
    if strays:
        warnings.append(f"{len(strays)} tensors have names of adapter weights, such as {strays[0]}: not merged yet?")
    if values:
        wrong = {name: count for name, ref in checkpoint.items() if ref.spec.floating and (count := scan(ref)[0])}
        warnings += [f"{name}: {count} non-finite value{'s' if count > 1 else ''}" for name, count in wrong.items()]
    return {
        "path": str(checkpoint.path),
        "format": "checkpoint",
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs.values()),
        "bytes": sum(file.size for file in checkpoint.files.values()),
        "dtypes": dict(Counter(spec.dtype for spec in specs.values())),
        "shards": len(checkpoint.files),
        "quantization": checkpoint.quantization,
        "components": {prefix.rstrip("."): _component(part) for prefix, part in checkpoint.parts.items() if prefix} or None,
        "warnings": warnings,
    }


def _component(part: Checkpoint) -> dict[str, Any]:
    parameters = sum(spec.numel for spec in part.specs.values())
    return {"tensors": len(part), "parameters": parameters, "quantization": part.quantization}


def tensors(path: str | Path) -> list[dict[str, Any]]:
    """A checkpoint's tensors as rows of name, dtype, shape and parameters, from headers."""
    with headers(path) as place:
        specs = open_checkpoint(place).specs
    return [{"name": name, "dtype": spec.dtype, "shape": list(spec.shape), "parameters": spec.numel} for name, spec in specs.items()]
