"""What a fit did, as a person reads it: kinds, ranks and scalings, the error beside the best possible, what went apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loratools.cli._algebra import ending
from loratools.cli._numbers import count, many, number, percent, span
from loratools.cli._table import facts, table
from loratools.names import grouped

Row = Mapping[str, Any]
WORST = 5


def fitted(receipt: Row, out: str, columns: int | None) -> list[str]:
    """The receipt as lines for so many columns."""
    rows = receipt["tensors"]
    pairs = [("fitted", f"{out}, for {receipt['arguments']['target']}")]
    pairs.append(("held", f"{count(receipt['applied'])} of {count(receipt['expected'])} deltas"))
    became = Counter((row["kind_before"], row["kind"]) for row in rows if row["kind_before"] != row["kind"])
    pairs += [("kind", f"{before} to {after}, {many(number_of, 'tensor')}") for (before, after), number_of in became.items()]
    pairs += _spans(rows)
    apart = [row["name"] for row in receipt["left_out"]]
    pairs += [("apart", ", ".join(pattern for pattern, _ in grouped(apart)))] if apart else []
    lossy = [row for row in rows if row["error"]]
    pairs.append(("error", _error(rows) if lossy else "none: every ΔW is what it was"))
    worst = sorted(lossy, key=lambda row: (-row["error"], row["name"]))[:WORST]
    return facts(pairs + ending(receipt, out), columns) + (["", *_table(worst, len(lossy), columns)] if worst else [])


def _spans(rows: list[Row]) -> list[tuple[str, str]]:
    pairs = []
    ranks, before = ([row[key] for row in rows if row.get(key) is not None] for key in ("rank", "rank_before"))
    if ranks:
        told = f"{span(before)} before, " if before and sorted(before) != sorted(ranks) else ""
        pairs.append(("rank", f"{told}{span(ranks)}{' now' if told else ''}"))
    scalings = sorted({round(row["scaling"], 6) for row in rows if row.get("rank") is not None and "scaling" in row})
    earlier = sorted({round(row["scaling_before"], 6) for row in rows if row.get("rank_before") is not None and "scaling_before" in row})
    if scalings:
        told = f"{_some(earlier)} before, " if earlier and earlier != scalings else ""
        pairs.append(("scaling", f"{told}{_some(scalings)}{' now' if told else ''}"))
    return pairs


def _some(values: list[float]) -> str:
    return number(values[0], 4) if len(values) == 1 else f"{number(values[0], 4)}–{number(values[-1], 4)}"


def _error(rows: list[Row]) -> str:
    """‖ΔW − ΔW′‖ over all that has a share, beside the best there is where that is known of all."""
    known = [row for row in rows if row["share"] and row["error"] is not None]
    held = math.fsum(row["share"] for row in known)
    error = math.sqrt(math.fsum(row["share"] * row["error"] ** 2 for row in known) / held) if held else 0.0
    text = f"{number(error)} of ‖ΔW‖ as stored"
    if any(row["optimal_error"] is None for row in known):
        return text
    best = math.sqrt(math.fsum(row["share"] * row["optimal_error"] ** 2 for row in known) / held) if held else 0.0
    return f"{text}; the best possible at these ranks is {number(best)}"


def _table(worst: list[Row], of: int, columns: int | None) -> list[str]:
    cells = {
        "worst modules" if of > WORST else "module": [row["name"].removesuffix(".weight") for row in worst],
        "rank": ["–" if row["rank"] is None else str(row["rank"]) for row in worst],
        "error": [number(row["error"]) for row in worst],
        "best possible": ["–" if row["optimal_error"] is None else number(row["optimal_error"]) for row in worst],
        "share of ΔW": [percent(row["share"]) if row["share"] is not None else "–" for row in worst],
    }
    return table(cells, columns)
