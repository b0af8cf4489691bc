"""Every two of several adapters, as compare tells them, kept to what a page shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Additive
from loratools.ops._base import Base
from loratools.ops.compare import between

ANGLES = 16  # principal angles of a module that a page shows

Row = dict[str, Any]


def pairs(adapters: Sequence[Adapter], on: Base | None, threads: int, told: Callable[[int], None]) -> list[Row]:
    """A row for each two adapters, by their places `a` < `b`: totals, modules that both change, what has no measure, notes.

    Angles are in degrees. The adapters are under one set of names: `ops._base.resolved` sees to that. With a base what a DoRA makes
    of its weights is compared, and `told` hears of the bytes that are read for it.
    """
    return [_pair(adapters, a, b, on, threads, told) for a, b in combinations(range(len(adapters)), 2)]


def again(adapters: Sequence[Adapter], on: Base | None) -> int:
    """Bytes of the base's weights that all pairs read."""
    return sum(_read(one, other, on) for one, other in combinations(adapters, 2))


def _read(one: Adapter, other: Adapter, on: Base | None) -> int:
    if on is None:
        return 0
    plain = {name: all(isinstance(side[name], Additive) for side in (one, other) if name in side) for name in (*one, *other)}
    return sum(on.weight(name).spec.nbytes for name, both in plain.items() if not both and name in on)


def _pair(adapters: Sequence[Adapter], a: int, b: int, on: Base | None, threads: int, told: Callable[[int], None]) -> Row:
    one, other = adapters[a], adapters[b]
    found, _ = between(one, other, on, threads, faults=True)
    told(_read(one, other, on))
    return {
        "a": a, "b": b, "total": found["total"],
        "modules": [_module(row) for row in found["modules"]],
        "others": [{word: row.get(word) for word in ("name", "equal", "relative_distance")} for row in found["others"]],
        "incomparable": [{word: row[word] for word in ("name", "reason")} for row in found["incomparable"]],
        "only_a": len(found["only_a"]), "only_b": len(found["only_b"]),
        "notes": [note for note in found["notes"] if note not in (*one.notes, *other.notes)],
    }  # fmt: skip


def _module(row: Row) -> Row:
    kept = ("name", "norm_a", "norm_b", "cosine", "relative_distance", "column_overlap", "row_overlap", "magnitude_distance")
    angles = {word: [round(math.degrees(angle), 1) for angle in row[word][:ANGLES]] for word in ("column_angles", "row_angles")}
    return {word: row.get(word) for word in kept} | angles
