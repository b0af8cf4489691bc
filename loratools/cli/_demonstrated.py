"""The demo's result as a person reads it: what was done, a row for each rank, then one rank tensor for tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratools.cli._numbers import count, number, percent, size
from loratools.cli._table import facts, table

Row = Mapping[str, Any]


def demonstrated(result: Row, columns: int | None) -> list[str]:
    """The demo's result as lines for so many columns."""
    extract, merge, images = result["extract"], result["merge"], result["images"]
    rank = extract["arguments"]["rank"]
    above = [
        ("task", result["task"]),
        ("network", f"{count(result['parameters'])} parameters, trained on {count(images['learnt_from'])} upright images"),
        ("fine-tune", "all of its weights, on the same images turned"),
        ("accuracy", f"on {count(images['held_out'])} turned images that no training saw"),
        ("error", "‖merged − fine-tune‖ / ‖fine-tune − base‖, measured on the files"),
    ]
    left_out = len(extract["left_out"]) + len(merge["left_out"])
    below = [
        ("applied", f"{count(merge['applied'])} of {count(merge['expected'])} changes at rank {rank}, {count(left_out)} left out"),
        ("written", f"{count(len(merge['digests']))} tensors, a BLAKE3 digest of each in the receipt"),
        ("kept", result["kept"] or "nothing; --keep DIR keeps the models, the adapters and their receipts"),
        ("took", f"{result['seconds']:.0f} s"),
    ]
    return [
        *facts(above, columns),
        "",
        *_ranks(result["rows"], columns),
        "",
        *_tensors(f"rank {rank}", extract["tensors"], {row["name"]: row for row in merge["tensors"]}, columns),
        "",
        *facts(below, columns),
    ]


def _ranks(rows: Sequence[Row], columns: int | None) -> list[str]:
    cells = {
        "model": [row["name"] for row in rows],
        "accuracy": [percent(row["accuracy"]) for row in rows],
        "on disk": [size(row["bytes"]) for row in rows],
        "error": [_shown(row["error"]) for row in rows],
        "best possible": [_shown(row["optimal_error"]) for row in rows],
        "applied": ["–" if row["applied"] is None else f"{row['applied']}/{row['expected']}" for row in rows],
    }
    return table(cells, columns)


def _tensors(title: str, rows: Sequence[Row], merged: Mapping[str, Row], columns: int | None) -> list[str]:
    """Both receipts of one rank side by side: what became of each tensor, and what of it came through the merge's rounding."""
    cells = {
        title: [row["name"] for row in rows],
        "‖ΔW‖/‖W‖": [_shown(row["relative_norm"]) for row in rows],
        "held as": ["whole" if row["rank"] is None else f"rank {row['rank']}" for row in rows],
        "error": [_shown(row["error"]) for row in rows],
        "best possible": [_shown(row["optimal_error"]) for row in rows],
        "survived": [_shown(merged[row["name"]]["survived"], percent) for row in rows],
    }
    return table(cells, columns)


def _shown(value: float | None, show: Callable[[float], str] = number) -> str:
    return "–" if value is None else show(value)
