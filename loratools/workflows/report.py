"""report: adapters as one page that a person can send: what each holds and changes, how they are apart, where they run.

The page is a single HTML file that loads nothing; spec/report.md tells what it shows.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

from loratools import __version__
from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.errors import FormatError, OptionError, raise_all
from loratools.formats import load
from loratools.formats.base import read_options
from loratools.formats.reading import Reading, paths, reads
from loratools.ops._base import Base, resolved
from loratools.ops._heatmap import grid
from loratools.ops._layers import place_of
from loratools.ops.inspect import holds_adapter
from loratools.output import check_output, whole
from loratools.source.handles import name_of
from loratools.source.place import SCHEME
from loratools.workflows._report.findings import findings
from loratools.workflows._report.measured import measured, touched
from loratools.workflows._report.page import page
from loratools.workflows._report.pairs import again, pairs


@reads
def report(
    adapters: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Write a page about one or several adapters: a single HTML file that loads nothing from anywhere.

    It has each adapter's facts and warnings, a table of its modules, a map of them by layer, the singular values of each, what
    check finds for every target, the receipts beside its files, and of several adapters every two compared. With `base` the names
    are the base's, and changes are told as shares of its weights, which are read for it. `progress` is
    told (bytes done, bytes in all). The same inputs give the same bytes. Returns the data in the page.

    Raises OptionError for no adapter or one given twice, FormatError for what is no adapter, OutputError for an `out` that exists,
    MatchError for several whose names cannot meet, and what reading and resolving raise; then nothing is written.

    >>> report("adapter/", "report.html")["adapters"][0]["modules_total"]  # doctest: +SKIP
    72
    """
    given = [adapters] if isinstance(adapters, str | Path) else list(adapters)
    _check(given)
    target = check_output(out, overwrite=overwrite, inputs=paths(reading, given, base))
    if target.is_dir():
        raise OptionError("a report is one file", file=target, remedy="give a name such as -o report.html")
    on = None if base is None else Base(base, reading)
    loaded = [load(path, options=read_options(reading)) for path in given]
    _check_once(given, [os.path.realpath(adapter.path or path) for path, adapter in zip(given, loaded, strict=True)])
    known = resolved(loaded, on)
    data = _data(given, known, on, reading, threads, progress)
    title = " and ".join(row["label"] for row in data["adapters"])
    text = page(data, f"{title} – loratools report")
    with whole(target) as place:
        place.write_text(text, encoding="utf-8")
    return data


def _check(given: Sequence[str | Path]) -> None:
    if not given:
        raise OptionError("a report is of one adapter or more")
    _check_once(given, [os.path.realpath(path) for path in given])
    faults = [
        FormatError("a report is of adapters, and this is a checkpoint", file=path, remedy="give it with --base")
        for path in given
        if Path(path).exists() and not holds_adapter(Path(path))  # what is not here, reading will tell of
    ]
    raise_all(faults)


def _check_once(given: Sequence[str | Path], real: Sequence[str]) -> None:
    """Raise for an adapter that is given twice; `real` is where each lies."""
    times = Counter(real)
    twice = dict.fromkeys(path for path, place in zip(given, real, strict=True) if times[place] > 1)
    raise_all([OptionError("given twice", file=path) for path in twice])


def _data(
    given: Sequence[str | Path], known: Sequence[Adapter], on: Base | None, reading: Reading, threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:  # fmt: skip
    total = sum(touched(adapter, on) + sum(f.stat().st_size for f in adapter.files if f.suffix != ".json") for adapter in known)
    total += again(known, on)
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    with workers.single_threaded_blas():
        rows = [measured(path, adapter, on, reading, told) for path, adapter in zip(given, known, strict=True)]
    for row, label, path in zip(rows, labels(given), given, strict=True):
        row |= {"label": label, "findings": findings(path, on, reading)}
    names = ordered(name for adapter in known for name in adapter)
    down, across, cells = grid(names)
    return {
        "loratools": __version__,
        "base": None if on is None else name_of(on.checkpoint.path),
        "names": names,
        "grid": {"rows": down, "columns": _without_common(across), "cells": [cells[name] for name in names]},
        "adapters": rows,
        "pairs": pairs(known, on, threads or workers.default_threads(), told),
    }


def labels(given: Sequence[str | Path]) -> list[str]:
    """What each adapter is called: its last name, or as much of its path as tells it from the others.

    >>> labels([Path("a/style.safetensors"), Path("x/lora"), Path("y/lora")])
    ['style.safetensors', 'x/lora', 'y/lora']
    >>> labels(["hf://ada/many/x", "hf://ada/many/y/x"])
    ['many/x', 'y/x']
    """
    parts = [_parts(path) for path in given]
    depth = [1] * len(parts)
    while True:
        found = ["/".join(part[-length:]) for part, length in zip(parts, depth, strict=True)]
        unclear = [index for index, name in enumerate(found) if found.count(name) > 1 and depth[index] < len(parts[index])]
        if not unclear:
            return found
        for index in unclear:
            depth[index] += 1


def _parts(path: str | Path) -> tuple[str, ...]:
    """What a path is made of, a repository's without its scheme."""
    if Path(path).exists():
        return Path(os.path.realpath(path)).parts
    return tuple(str(path).removeprefix(SCHEME).split("/"))


def ordered(names: Any) -> list[str]:
    """Names once each, layer by layer; within a layer, and outside all, as they came.

    >>> ordered(["h.10.q", "h.2.q", "h.10.v", "head"])
    ['h.2.q', 'h.10.q', 'h.10.v', 'head']
    """
    listed = list(dict.fromkeys(names))
    places = {name: place_of(name) for name in listed}
    stacks = {stack: index for index, stack in enumerate(dict.fromkeys(place.stack for place in places.values()))}

    def key(name: str) -> tuple[bool, int, int]:
        place = places[name]
        return place.number is None, stacks[place.stack], place.number or 0

    return sorted(listed, key=key)


def _without_common(columns: Sequence[str]) -> list[str]:
    """Names of layers without the components all of them begin with."""
    split = [column.split(".") for column in columns if column != "–"]
    common = 0
    while split and all(len(parts) > common + 2 and parts[common] == split[0][common] for parts in split):
        common += 1
    return [".".join(column.split(".")[common:]) for column in columns]
