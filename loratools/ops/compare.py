"""compare: two adapters module by module, as changes of the weight: nothing of size m × n is made but what the base needs.

Factors alone tell nothing, as B·A = (B·M)·(M⁻¹·A) for every M. So cosine and distance are those of the ΔWs, and the subspaces are
the spans of their singular vectors: of the columns what a module writes, of the rows what it reads. With the base, its own
singular vectors tell which of a changed weight's directions are new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.errors import LoratoolsError, OptionError, UsageError
from loratools.formats.base import read_options
from loratools.formats.reading import Reading, arguments, paths, reads
from loratools.ops import _heatmap
from loratools.ops._algebra import label, loaded
from loratools.ops._base import Base, resolved
from loratools.ops._comparing import Row, cosine, norm_of, pair_row
from loratools.ops._figure import checked
from loratools.ops._intruders import EPSILON, TOP_K, intruders
from loratools.ops._layers import place_of


@reads
def compare(
    a: str | Path | Adapter,
    b: str | Path | Adapter,
    *,
    base: str | Path | None = None,
    top_k: int | None = None,
    epsilon: float | None = None,
    plot: str | Path | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """How far two adapters are apart, per module, per layer and in total, as a dictionary of plain values.

    `modules` has a row for each tensor that both change: ‖ΔW‖ of each, their cosine and distance, the principal angles (radians,
    rising) between the column and between the row spaces, and the overlaps, the mean of cos² of these angles (Hu et al. 2021,
    section 7.2: 1 where one space holds the other, 0 where they are orthogonal). `layers` has the same per layer, `others` biases
    and saved tensors, `only_a` and `only_b` what one alone has, `incomparable` what has no common measure, with the reason.
    `total` counts a module that one lacks as a change of 0 there, and leaves out, as a note says, what has no measure; its norms are
    None where nothing has one. Of a DoRA the directions ΔV are compared, and the magnitudes'
    distance is told; with `base`, what it makes of the weight is.

    With `base`, `intruders` has for each adapter and module how many of the `top_k` (10) leading left singular vectors of W′ have
    a cosine below `epsilon` (0.5) with all of W's, and the share of ‖ΔW‖² in W's `top_k` leading directions beside that of a
    random change: two whole SVDs a module, one module at a time, `progress` being told (bytes of the base done, in all). `plot`
    draws cosine and overlaps by layer and module (.png, .svg or .pdf). Raises OptionError, MissingExtra without matplotlib.

    >>> compare("adapter/", "adapter/")["total"]["cosine"]  # doctest: +SKIP
    1.0
    """
    words = arguments(locals(), "a", "b", "progress")
    check(words)
    inputs = paths(reading, [a, b], base)
    target = None if plot is None else checked(plot, inputs)
    read_as, count = read_options(reading), threads or workers.default_threads()
    on = None if base is None else Base(base, reading)
    one, other = resolved([loaded(item, read_as) for item in (a, b)], on)
    told, alone = between(one, other, on, count)
    told = {"a": label(a), "b": label(b)} | told
    if on is not None:
        told["base"] = str(base)
        told["intruders"] = intruders(on, (one, other), top_k or TOP_K, EPSILON if epsilon is None else epsilon, progress)
    if target is not None:
        _draw(target, told, [*(row["name"] for row in told["modules"]), *alone])
    return told


def between(
    one: Adapter, other: Adapter, on: Base | None, threads: int, *, faults: bool = False
) -> tuple[dict[str, Any], dict[str, float]]:
    """What compare tells of two adapters under one set of names, without their labels and intruders, and ‖ΔW‖ of what one alone has.

    With `faults`, what cannot be computed of a tensor is among `incomparable` with its reason instead of an error.
    """
    found: dict[str, Row] = {}
    alone: dict[str, float] = {}
    names = [*one, *(name for name in other if name not in one)]
    with workers.single_threaded_blas():
        workers.run_all([partial(_one, name, one, other, on, found, alone, faults) for name in names], threads)
    rows = [found[name] for name in names if name in found]
    modules = [row for row in rows if "cosine" in row]
    told = {
        "total": _total(modules, one, other, alone), "layers": _layers(modules, one, other, alone),
        "modules": modules, "others": [row for row in rows if "equal" in row],
        "incomparable": [row for row in rows if "reason" in row],
        "only_a": [name for name in one if name not in other], "only_b": [name for name in other if name not in one],
        "notes": _notes(one, other, on) + _left_out(found, alone, one, other, on),
    }  # fmt: skip
    return told, alone


def check(words: Mapping[str, Any]) -> None:
    """Raise OptionError for words that have no meaning together, or a value outside its range."""
    for word in ("top_k", "epsilon"):
        if words[word] is not None and words["base"] is None:
            raise UsageError(f"--{word.replace('_', '-')} has no meaning without --base", found=words[word])
    top_k, epsilon, threads = (words[word] for word in ("top_k", "epsilon", "threads"))
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise UsageError("--top-k", found=top_k, expected="a whole number of at least 1")
    if epsilon is not None and not 0 < epsilon <= 1:
        raise UsageError("--epsilon", found=epsilon, expected="more than 0, at most 1")
    if threads is not None and threads < 1:
        raise UsageError("--threads", found=threads, expected="at least 1")


def _one(
    name: str, one: Adapter, other: Adapter, on: Base | None, found: dict[str, Row], alone: dict[str, float], faults: bool
) -> None:
    weight = on.weight(name) if on is not None and name in on else None
    try:
        if name in one and name in other:
            found[name] = {"name": name, "layer": place_of(name).layer, **pair_row(one[name], other[name], weight)}
        else:
            norm = norm_of(one[name] if name in one else other[name], weight)
            if norm is not None:
                alone[name] = norm
    except LoratoolsError as error:
        if faults:
            found[name] = {"name": name, "layer": place_of(name).layer, "reason": str(error)}
            return
        raise error.at(file=(one if name in one else other).path, tensor=name) from None


def _total(modules: Sequence[Row], one: Mapping[str, Delta], other: Mapping[str, Delta], alone: Mapping[str, float]) -> Row:
    """All modules as one vector; a module that one adapter lacks is zero there. None, not 0, where no tensor has a measure."""
    if (one or other) and not modules and not alone:
        return {
            "modules": 0, "norm_a": None, "norm_b": None, "cosine": None, "distance": None, "relative_distance": None,
            "column_overlap": None, "row_overlap": None,
        }  # fmt: skip
    only = [math.fsum(norm**2 for name, norm in alone.items() if name in side) for side in (one, other)]
    norm_a, norm_b = (
        math.sqrt(math.fsum(row[key] ** 2 for row in modules) + more) for key, more in zip(("norm_a", "norm_b"), only, strict=True)
    )
    distance = math.sqrt(math.fsum(row["distance"] ** 2 for row in modules) + sum(only))
    return {
        "modules": len(modules), "norm_a": norm_a, "norm_b": norm_b,
        "cosine": cosine(math.fsum(row["inner"] for row in modules), norm_a, norm_b), "distance": distance,
        "relative_distance": distance / norm_a if norm_a else None,
        "column_overlap": _mean([row["column_overlap"] for row in modules]), "row_overlap": _mean([row["row_overlap"] for row in modules]),
    }  # fmt: skip


def _layers(modules: Sequence[Row], one: Mapping[str, Delta], other: Mapping[str, Delta], alone: Mapping[str, float]) -> list[Row]:
    """The same for each layer, in the order of stacks and numbers."""
    places = {place_of(name).layer: place_of(name) for name in (*[row["name"] for row in modules], *alone)}
    listed = sorted((place for place in places.values() if place.number is not None), key=lambda place: (place.stack, place.number))
    rows = []
    for place in listed:
        inside = [row for row in modules if row["layer"] == place.layer]
        apart = {name: norm for name, norm in alone.items() if place_of(name).layer == place.layer}
        rows.append({"layer": place.layer, **_total(inside, one, other, apart)})
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _draw(target: Path, told: Mapping[str, Any], names: Sequence[str]) -> None:
    """Cosine and overlaps by layer and module, those that there are; what one of the two lacks has a cell without a value."""
    kinds = {
        "cosine": ("cosine of the changes ΔW", "cosine", -1.0),
        "column_overlap": ("overlap of what they write (columns)", "mean cos² of angles", 0.0),
        "row_overlap": ("overlap of what they read (rows)", "mean cos² of angles", 0.0),
    }
    panels = [
        _heatmap.Panel(title, label, {row["name"]: row[key] for row in told["modules"]}, low)
        for key, (title, label, low) in kinds.items()
        if any(row[key] is not None for row in told["modules"])
    ]
    if not panels:
        raise OptionError("--plot, and no module has a measure to draw", remedy=None if "base" in told else "--base may give one")
    _heatmap.draw(target, panels, title=f"{told['a']} and {told['b']}", names=names)


def _notes(one: Adapter, other: Adapter, on: Base | None) -> list[str]:
    notes = list(dict.fromkeys((*one.notes, *other.notes)))
    if not set(one) & set(other):
        notes.append("no tensor is in both: are they adapters of one base, under the same names?")
    if on is None and any(isinstance(delta, DoRA) for delta in (*one.values(), *other.values())):
        notes.append("DoRA: the directions ΔV are compared; what W' makes of them depends on the base, which --base gives")
    return notes


def _left_out(found: Mapping[str, Row], alone: Mapping[str, float], one: Adapter, other: Adapter, on: Base | None) -> list[str]:
    """What the totals cannot count, so that a distance is not taken for all of it: no measure, or unmeasured on one side alone."""
    one_sided = [name for name in {**one, **other} if name not in found and name not in alone and not _told_whole(name, one, other)]
    count = sum("reason" in row for row in found.values()) + len(one_sided)
    if not count:
        return []
    remedy = "; --base may give one" if on is None else ""
    return [f"{count} {'tensor has' if count == 1 else 'tensors have'} no measure and {'is' if count == 1 else 'are'} in no total{remedy}"]


def _told_whole(name: str, one: Adapter, other: Adapter) -> bool:
    """Whether it is a bias or a tensor saved whole, which no total counts in any case."""
    delta = one[name] if name in one else other[name]
    return isinstance(delta, Full | Replacement)
