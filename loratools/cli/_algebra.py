"""What rescale, resize, combine and compare did, as a person reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.cli._names import grouped
from loratools.cli._numbers import count, many, number, percent, size, span
from loratools.cli._table import facts, table
from loratools.receipt import receipt_path

Row = Mapping[str, Any]
Pairs = list[tuple[str, str]]
WORST = 5  # modules in a table of errors


def rescaled(receipt: Row, out: str, columns: int | None) -> list[str]:
    """Every module's scaling before and after, modules that are alike on one line."""
    rows = {row["name"]: row for row in receipt["tensors"]}
    pairs = [("rescaled", out), ("held", f"{count(receipt['applied'])} of {count(receipt['expected'])} deltas")]
    errors = [row["error"] for row in rows.values()]
    exact = "exact: no bit of ΔW is lost" if not any(errors) else f"at most {number(max(errors), 2)} of a module's ‖ΔW‖, by rounding B"
    pairs.append(("rounding", exact))
    alike = {name: tuple(row.get(key) for key in _TOLD) for name, row in rows.items()}
    groups = [(pattern, rows[names[0]]) for pattern, names in grouped(rows, alike)]
    cells = {"module": [pattern.removesuffix(".weight") for pattern, _ in groups]}
    cells |= {title: [_shown(row.get(key)) for _, row in groups] for key, title in _TOLD.items()}
    return [*facts(pairs + ending(receipt, out), columns), "", *table(cells, columns)]


def resized(receipt: Row, out: str, columns: int | None) -> list[str]:
    """Ranks before and after, the error of all modules together beside the best possible, then the worst of them."""
    return _factored("resized", receipt, out, columns)


def combined(receipt: Row, out: str, columns: int | None) -> list[str]:
    """The same for a sum, and how many adapters meet on a module."""
    return _factored("combined", receipt, out, columns)


def _factored(word: str, receipt: Row, out: str, columns: int | None) -> list[str]:
    rows = [row for row in receipt["tensors"] if row["rank"] is not None]
    pairs = [(word, out), ("held", f"{count(receipt['applied'])} of {count(receipt['expected'])} deltas")]
    pairs += [("rank", f"{span(row['rank_before'] for row in rows)} before, {span(row['rank'] for row in rows)} now")] if rows else []
    held = math.fsum(row["share"] or 0.0 for row in rows)
    if held:
        squares = (math.fsum((row["share"] or 0.0) * row[which] ** 2 for row in rows) for which in ("error", "optimal_error"))
        error, best = (math.sqrt(square / held) for square in squares)
        pairs.append(("error", f"{number(error)} of ‖ΔW‖ as stored; the best possible at these ranks is {number(best)}"))
    worst = sorted(rows, key=lambda row: (-row["error"], row["name"]))[:WORST]
    cells = {
        "worst modules" if len(rows) > WORST else "module": [row["name"].removesuffix(".weight") for row in worst],
        "rank before": [str(row["rank_before"]) for row in worst],
        "rank": [str(row["rank"]) for row in worst],
        "error": [number(row["error"]) for row in worst],
        "best possible": [number(row["optimal_error"]) for row in worst],
        "share of ΔW": [percent(row["share"]) if row["share"] is not None else "–" for row in worst],
    }
    below = ["", *table(cells, columns)] if worst else []
    return facts(pairs + ending(receipt, out), columns) + below


def compared(found: Row, columns: int | None) -> list[str]:
    """The whole, then a line for each module, then what stands on one side alone."""
    total, modules = found["total"], found["modules"]
    pairs = [
        ("a", found["a"]), ("b", found["b"]),
        ("‖ΔW‖", f"{number(total['norm_a'])} and {number(total['norm_b'])}"),
        ("cosine", _shown(total["cosine"])),
        ("distance", f"{number(total['distance'])}, {_of(total['relative_distance'])} of a's ‖ΔW‖"),
        ("overlap", f"columns {_of(total['column_overlap'])}, rows {_of(total['row_overlap'])}; of {many(total['modules'], 'module')}"),
    ]  # fmt: skip
    pairs += [
        (f"only in {side}", ", ".join(pattern for pattern, _ in grouped(found[f"only_{side}"]))) for side in "ab" if found[f"only_{side}"]
    ]
    equal = [row["name"] for row in found["others"] if row["equal"]]
    pairs += [("equal", ", ".join(pattern for pattern, _ in grouped(equal)))] if equal else []
    pairs += [("differs", f"{row['name']}: by {_of(row['relative_distance'])}") for row in found["others"] if not row["equal"]]
    pairs += [("no measure", f"{row['name']}: {row['reason']}") for row in found["incomparable"]]
    if not modules:
        return facts(pairs, columns)
    shown = {"cosine": "cosine", "relative_distance": "distance / ‖ΔW‖", "column_overlap": "columns", "row_overlap": "rows"}
    cells = {"module": [row["name"].removesuffix(".weight") for row in modules]}
    cells |= {"ranks": [f"{row['rank_a']}, {row['rank_b']}" for row in modules]}
    cells |= {title: [_of(row[key]) for row in modules] for key, title in shown.items()}
    return [*facts(pairs, columns), "", *table(cells, columns)]


def _of(value: float | None) -> str:
    return "–" if value is None else number(value, 4)


_TOLD = {
    "rank": "rank", "alpha_before": "alpha before", "alpha": "alpha", "scaling_before": "scaling before", "scaling": "scaling",
    "factor": "B times",
}  # fmt: skip


def _shown(value: float | None) -> str:
    return "–" if value is None else number(value, 6)


def ending(receipt: Row, out: str) -> Pairs:
    """What lies on disk, and where the receipt is."""
    written = sum(entry["bytes"] for entry in receipt["outputs"])
    place = receipt_path(Path(out), folder=Path(out).is_dir())
    return [
        ("on disk", f"{size(written)}: {many(len(receipt['outputs']), 'file')}"),
        ("receipt", str(place)),
        ("took", f"{receipt['seconds']:.1f} s"),
    ]
