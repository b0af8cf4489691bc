"""Every two of several adapters, as compare tells them, kept to what a page shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from loratools.adapter import Adapter
from loratools.ops.compare import compare

ANGLES = 16  # principal angles of a module that a page shows

Row = dict[str, Any]


def pairs(adapters: Sequence[Adapter], *, based: bool, threads: int | None) -> list[Row]:
    """A row for each two adapters, by their places `a` < `b`: totals, modules that both change, what has no measure, notes.

    Angles are in degrees. They are under one set of names: `ops._base.resolved` sees to that.
    """
    return [_pair(adapters, a, b, based, threads) for a, b in combinations(range(len(adapters)), 2)]


def _pair(adapters: Sequence[Adapter], a: int, b: int, based: bool, threads: int | None) -> Row:
    one, other = adapters[a], adapters[b]
    found = compare(one, other, threads=threads)
    return {
        "a": a, "b": b, "total": found["total"],
        "modules": [_module(row) for row in found["modules"]],
        "others": [{word: row.get(word) for word in ("name", "equal", "relative_distance")} for row in found["others"]],
        "incomparable": [{word: row[word] for word in ("name", "reason")} for row in found["incomparable"]],
        "only_a": len(found["only_a"]), "only_b": len(found["only_b"]),
        "notes": [_note(note, based) for note in found["notes"] if note not in (*one.notes, *other.notes)],
    }  # fmt: skip


def _module(row: Row) -> Row:
    kept = ("name", "norm_a", "norm_b", "cosine", "relative_distance", "column_overlap", "row_overlap", "magnitude_distance")
    angles = {word: [round(math.degrees(angle), 1) for angle in row[word][:ANGLES]] for word in ("column_angles", "row_angles")}
    return {word: row.get(word) for word in kept} | angles


def _note(note: str, based: bool) -> str:
    """compare's own remedy is an option that the report was given, and which it has for the norms alone."""
    return "DoRA: the directions ΔV are compared; loratools compare --base compares W′" if based and note.startswith("DoRA:") else note
