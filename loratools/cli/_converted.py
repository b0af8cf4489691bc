"""What a conversion did, as a person reads it: kinds, the error beside the best possible, the part of it that only scales rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loratools.cli._algebra import ending
from loratools.cli._numbers import count, many, number, percent, span
from loratools.cli._table import facts, table

Row = Mapping[str, Any]
WORST = 5


def converted(receipt: Row, out: str, columns: int | None) -> list[str]:
    """The receipt as lines for so many columns."""
    rows = receipt["tensors"]
    pairs = [("converted", out), ("held", f"{count(receipt['applied'])} of {count(receipt['expected'])} deltas")]
    became = Counter((row["kind_before"], row["kind"]) for row in rows)
    pairs += [("kind", f"{before} to {after}, {many(number_of, 'tensor')}") for (before, after), number_of in became.items()]
    kept = receipt["applied"] - len(rows)
    pairs += [("kept", f"{many(kept, 'tensor')}, byte for byte")] if kept else []
    ranks = [row["rank"] for row in rows if row["rank"] is not None]
    pairs += [("rank", span(ranks))] if ranks else []
    pairs += _errors(rows)
    worst = sorted((row for row in rows if row["error"] is not None), key=lambda row: (-row["error"], row["name"]))[:WORST]
    return facts(pairs + ending(receipt, out), columns) + (["", *_table(worst, len(rows), columns)] if worst else [])


def _errors(rows: list[Row]) -> list[tuple[str, str]]:
    """‖W″ − W′‖ over all that was converted, in ‖W′ − W‖, beside the best there is where that is known of all."""
    known = [row for row in rows if row["share"] is not None and row["error"] is not None]
    held = math.fsum(row["share"] for row in known)
    if not held:
        return []

    def total(which: str, some: list[Row]) -> float:
        return math.sqrt(math.fsum(row["share"] * row[which] ** 2 for row in some) / held)

    error, text = total("error", known), "none: as stored it is what was computed"
    if error:
        bounded = all(row["optimal_error"] is not None for row in known)
        best = total("optimal_error", known) if bounded else None
        beside = "no bound of the best is known" if best is None else f"the best possible at these ranks is {number(best)}"
        text = f"{number(error)} of ‖W' − W‖ as stored; {'rounding alone' if best == 0 else beside}"
    pairs = [("error", text)]
    plain = [row for row in known if "plain_error" in row]
    pairs += [("without m", f"{number(total('plain_error', plain))} at best, with factors of these ranks alone")] if plain else []
    scaled = [row for row in known if "row_scaling" in row]
    if scaled:
        share = number(total("row_scaling", scaled))
        pairs.append(("magnitudes", f"{share} of ‖W' − W‖ is their scaling of W itself, which has full rank"))
    return pairs


def _table(worst: list[Row], of: int, columns: int | None) -> list[str]:
    shown = {"rank": "rank", "error": "error", "optimal_error": "best possible", "plain_error": "without m", "row_scaling": "magnitudes"}
    cells = {"worst modules" if of > len(worst) else "module": [row["name"].removesuffix(".weight") for row in worst]}
    for key, title in shown.items():
        if any(row.get(key) for row in worst) or key == "error":
            cells[title] = ["–" if row.get(key) is None else number(row[key]) for row in worst]
    cells["share of change"] = ["–" if row["share"] is None else percent(row["share"]) for row in worst]
    return table(cells, columns)
