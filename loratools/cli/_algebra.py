"""What rescale, resize, combine and compare did, as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.cli._names import grouped
from loratools.cli._numbers import count, many, number, size
from loratools.cli._table import facts, table
from loratools.receipt import receipt_path

Row = Mapping[str, Any]
Pairs = list[tuple[str, str]]
SHOWN = 12  # lines of a table of modules


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


_TOLD = {
    "rank": "rank", "alpha_before": "alpha before", "alpha": "alpha", "scaling_before": "scaling before", "scaling": "scaling",
    "factor": "B times",
}  # fmt: skip


def _shown(value: float | None) -> str:
    return "–" if value is None else number(value, 6)


def ending(receipt: Row, out: str) -> Pairs:
    """What lies on disk, and where the receipt is."""
    from pathlib import Path

    written = sum(entry["bytes"] for entry in receipt["outputs"])
    place = receipt_path(Path(out), folder=Path(out).is_dir())
    return [
        ("on disk", f"{size(written)}: {many(len(receipt['outputs']), 'file')}"),
        ("receipt", str(place)),
        ("took", f"{receipt['seconds']:.1f} s"),
    ]
