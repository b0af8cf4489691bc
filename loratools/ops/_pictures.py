"""What the pictures of `inspect` and `extract` show: each module's change, spectrum, error at other sizes, and magnitudes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools.adapter import Adapter
from loratools.compress import hollow, widest
from loratools.deltas.base import Delta
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, OptionError
from loratools.formats import encode
from loratools.formats.base import Container
from loratools.ops._algebra import format_of, low_of, with_low
from loratools.ops._beside import change_norm
from loratools.ops._budget_plot import Curve, Plan, Spectrum, curve
from loratools.ops._extraction import Extraction
from loratools.ops._heatmap import Panel
from loratools.ops._page import Page
from loratools.ops._resizing import following, squares
from loratools.ops._size import file_bytes
from loratools.refs import BITS

SPREAD = 30.0  # the largest value beside the smallest from which a scale is logarithmic
DECADES = 1e-4  # of the largest value, where a logarithmic scale begins at the latest
Row = Mapping[str, Any]


# -- an adapter


def adapter_page(
    title: str, adapter: Adapter, joined: Mapping[str, Delta], rows: Mapping[str, Row], drift: Mapping[str, Sequence[float]], *,
    on_base: bool = False,
) -> Page:  # fmt: skip
    """The page of an adapter as it was read, `joined` to a base's names, of inspect's rows, which tell shares of the weights `on_base`."""
    names = [name for name, delta in joined.items() if not isinstance(delta, Full) and len(rows[name]["shape"]) != 1]
    ranks = {name: row["effective_rank"] for name, row in rows.items()}
    if on_base:
        first = scaled("Change beside the weight", "‖ΔW‖ / ‖W‖", {name: rows[name]["relative_norm"] for name in names})
    else:
        first = scaled("Change of each module", "‖ΔW‖", {name: change_norm(joined[name], None, rows[name]) for name in names})
    heats = [first]
    if any(ranks.get(name) is not None for name in names):
        most = max([row["rank"] or 1 for row in rows.values()], default=1)
        heats.append(scaled("Effective rank of the change", f"at most {most}", {name: ranks[name] for name in names}, form=".3g"))
    spectra = {name: row["sigma"] for name, row in rows.items() if row["sigma"] and row["sigma"][0] > 0}
    page = Page(title, _told(rows), names, heats, spectra=spectra, curve=_adapter_curve(adapter), drift=drift)
    if page.empty:
        raise OptionError("--plot, and no module has a measure to draw", remedy=None if on_base else "--base may give one")
    return page


def _told(rows: Mapping[str, Row]) -> str:
    kinds = dict.fromkeys(row["kind"] for row in rows.values())
    ranks = sorted({row["rank"] for row in rows.values() if row["rank"]})
    told = [f"{len(rows):,} {'tensor' if len(rows) == 1 else 'tensors'}", " and ".join(kinds)]
    return ", ".join([*told, *([f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"] if ranks else [])])


def _adapter_curve(adapter: Adapter) -> Curve | None:
    """Error against size as `resize` would have it; None for what it would refuse, and where nothing changes."""
    try:
        lows = {name: low for name, delta in adapter.items() if (low := low_of(delta)) is not None}
        format = format_of(None, adapter)

        def container(planned: Mapping[str, LowRank]) -> Container:
            deltas = {name: with_low(delta, planned[name]) if name in planned else delta for name, delta in adapter.items()}
            return encode(replace(adapter, deltas=following(adapter, deltas)), format)

        spectra = {name: _spectrum(low, squares(low)) for name, low in lows.items()}
        if not any(one.total for one in spectra.values()):
            return None
        return curve(spectra, lambda plan: _bytes(container(_planned(lows, plan))), {name: low.rank for name, low in lows.items()},
                     label="as it is")  # fmt: skip
    except LoratoolsError:  # a kind or a format that resize refuses: there is no such curve
        return None


# -- an extraction


def extraction_page(title: str, work: Extraction, deltas: Mapping[str, Delta], error: float, size: int) -> Page:
    """The page of an extraction: what changed, how much of it is missed, its leading singular values, and error against size."""
    changes = {name: change for name, change in work.changes.items() if change.norm is not None and _matrix(work, name)}
    missed = {name: _missed(change.factored, change.delta) for name, change in changes.items()}
    heats = [
        scaled("Change beside the weight", "‖ΔW‖ / ‖W‖", {name: change.relative_norm for name, change in changes.items()}),
        scaled("Error of what was extracted", "‖ΔW − BA‖ / ‖ΔW‖", missed),
    ]
    spectra = {name: [math.sqrt(value) for value in change.sigma2] for name, change in changes.items() if change.sigma2}
    ranks = [delta.rank for delta in deltas.values() if isinstance(delta, LowRank)]
    told = [f"{len(deltas):,} of {len(work.changes):,} changed tensors"]
    told += [f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"] if ranks else []
    found = _extraction_curve(work, deltas, (size, error))
    return Page(title, ", ".join(told), list(changes), heats, spectra=spectra, leading=True, curve=found)


def _extraction_curve(work: Extraction, deltas: Mapping[str, Delta], at: tuple[int, float]) -> Curve | None:
    lows = {name: delta for name, delta in deltas.items() if isinstance(delta, LowRank) and work.changes[name].sigma2}
    if not lows:
        return None
    spectra = {}
    for name, low in lows.items():
        change = work.changes[name]
        spectra[name] = _spectrum(low, change.sigma2, most=len(change.sigma2), total=(change.norm or 0.0) ** 2)
    besides = math.fsum(change.norm**2 for change in work.changes.values() if change.delta is None and change.norm)

    def size(plan: Plan) -> int:
        return _bytes(encode(work.adapter({**deltas, **_planned(lows, plan)}), work.options.format))

    here = {name: low.rank for name, low in lows.items()}
    return curve(spectra, size, here, label="extracted", besides=besides, at=at)


def _matrix(work: Extraction, name: str) -> bool:
    return len(work.pair.tuned[name].spec.shape) > 1


def _missed(known: Any, delta: Delta | None) -> float:
    """The relative error of a tensor: all of it where it is left out, nothing where it is saved whole."""
    if delta is None:
        return 1.0
    return known.error / known.norm if known is not None and known.norm else 0.0


# -- both


def scaled(title: str, label: str, values: Mapping[str, float | None], *, form: str = ".2g") -> Panel:
    """A map from 0 to the largest value, or a logarithmic one where they are too far apart to be told from each other."""
    known = [value for value in values.values() if value]
    high = max(known, default=1.0)
    form = f"#{form}" if high < 10 else form  # 0.10 beside 0.12, but no 36.
    if known and high / min(known) > SPREAD:
        return Panel(title, label, values, max(min(known), DECADES * high), high, log=True, form=form)
    return Panel(title, label, values, 0.0, high, form=form)


def _spectrum(low: LowRank, sigma2: Sequence[float], *, most: int | None = None, total: float | None = None) -> Spectrum:
    bits = BITS[widest([low])]
    per_rank = (low.B.spec.shape[0] + low.A.spec.numel // max(1, low.rank)) * bits // 8
    return Spectrum(list(sigma2), per_rank, low.rank if most is None else most, math.fsum(sigma2) if total is None else total)


def _planned(lows: Mapping[str, LowRank], plan: Plan) -> dict[str, LowRank]:
    """The LoRAs at other ranks, without data."""
    return {name: hollow(low, plan[name], widest([low])) for name, low in lows.items()}


def _bytes(container: Container) -> int:
    """The size of the file of weights; of one that is no safetensors, of its tensors alone."""
    if container.writer is None:
        return file_bytes(container)
    return sum(ref.spec.nbytes for ref in container.tensors.values())
