"""Receipts as a person reads them: what was done, how well, what was left out, and where it lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loratools.cli._numbers import count, many, number, percent, size, span
from loratools.cli._table import facts, table
from loratools.names import grouped, natural
from loratools.receipt import receipt_path

Row = Mapping[str, Any]
Pairs = list[tuple[str, str]]
WORST = 5
NAMED = 3


def merged(receipt: Row, out: str, columns: int | None) -> list[str]:
    """What a merge did, as lines for so many columns."""
    rows = receipt["tensors"]
    pairs = [
        ("merged", out),
        ("applied", f"{count(receipt['applied'])} of {count(receipt['expected'])} deltas"),
        ("changed", f"{count(len(rows))} of {count(len(receipt['digests']))} tensors{_others(receipt)}"),
    ]
    pairs += _spread("‖ΔW‖/‖W‖", rows, "relative_norm", number, worst=max)
    pairs += _spread("survived", rows, "survived", percent, worst=min, of=" of ‖ΔW‖")
    pairs += _spread("unmoved", rows, "unchanged", percent, worst=max, of=" of the weights")
    if "unmerge" in receipt:
        record = receipt["unmerge"]
        whole = f", {many(len(record['whole']), 'tensor')} of it stored whole" if record["whole"] else ""
        pairs.append(("undone by", f"{record['path']}, {size(record['bytes'])}, {percent(record['share'])} of the base{whole}"))
    return facts(pairs + _left_out(receipt["left_out"]) + _ending(receipt, out), columns)


def unmerged(receipt: Row, out: str, columns: int | None) -> list[str]:
    """What an undoing did, as lines for so many columns."""
    rows = receipt["tensors"]
    off = [row["off_by"] for row in rows if "off_by" in row]
    exact = f"subtracted: no weight is off by more than {number(max(off))}" if off else "every byte is the base's"
    pairs = [
        ("unmerged", out),
        ("removed", f"{count(receipt['applied'])} of {count(receipt['expected'])} deltas"),
        ("restored", f"{count(len(rows))} of {count(len(receipt['digests']))} tensors; {exact}"),
    ]
    return facts(pairs + _left_out(receipt["left_out"]) + _ending(receipt, out), columns)


def extracted(receipt: Row, out: str, columns: int | None) -> list[str]:
    """What an extraction did, as lines for so many columns: the errors beside the best possible ones, then the worst modules."""
    rows = receipt["tensors"]
    low = [row for row in rows if row["rank"] is not None]
    whole = f", {count(len(rows) - len(low))} of them whole" if len(rows) > len(low) else ""
    pairs = [("extracted", out), ("held", f"{count(receipt['applied'])} of {count(receipt['expected'])} changed tensors{whole}")]
    if low:
        pairs += [("rank", span(row["rank"] for row in low)), *_errors(rows, low)]
    above = facts(pairs + _left_out(receipt["left_out"]) + _ending(receipt, out), columns)
    return above + _worst(low, columns) if len(low) > 1 else above


def _errors(rows: Sequence[Row], low: Sequence[Row]) -> Pairs:
    """‖Δ − B·A‖/‖Δ‖ over all that the adapter holds, beside the least that any adapter of these ranks leaves."""
    held = math.fsum(row["share"] or 0.0 for row in rows)
    if not held:
        return []
    squares = ([row["share"] * row[which] ** 2 for row in low if row["share"]] for which in ("error", "optimal_error"))
    error, best = (math.sqrt(math.fsum(terms) / held) for terms in squares)
    return [
        ("error", f"{number(error)} of the change's norm; the best possible at these ranks is {number(best)}"),
        ("kept", f"{percent(max(0.0, 1 - error**2))} of the change's energy"),
    ]


def _worst(low: Sequence[Row], columns: int | None) -> list[str]:
    rows = sorted(low, key=lambda row: (-row["error"], row["name"]))[:WORST]
    title = "worst modules" if len(low) > WORST else "module"
    cells = {
        title: [row["name"].removesuffix(".weight") for row in rows],
        "rank": [str(row["rank"]) for row in rows],
        "error": [number(row["error"]) for row in rows],
        "best possible": [number(row["optimal_error"]) for row in rows],
        "share of change": [percent(row["share"]) if row["share"] is not None else "–" for row in rows],
    }
    return ["", *table(cells, columns)]


def _others(receipt: Row) -> str:
    if len(receipt["tensors"]) == len(receipt["digests"]):
        return ""
    dtype = receipt["arguments"]["dtype"]
    if dtype:
        return f"; the others are cast to {dtype}"
    computed = any("dequantised (" in note for note in receipt["notes"])
    return "; the others are the dequantised copy's" if computed else "; the others are the base's bytes"


def _spread(label: str, rows: Sequence[Row], field: str, show: Callable[[float], str], *, worst: Callable[..., Row], of: str = "") -> Pairs:
    """The median of a measure and its worst value, with the tensor that has it."""
    measured = [row for row in rows if row[field] is not None]
    if not measured:
        return []
    extreme = worst(measured, key=lambda row: row[field])
    if len(measured) == 1:
        return [(label, show(extreme[field]) + of)]
    least = "" if of else f"min {show(min(row[field] for row in measured))}, "
    middle = show(median(row[field] for row in measured))
    word = "min" if worst is min else "max"
    return [(label, f"{least}median {middle}{of}, {word} {show(extreme[field])} ({extreme['name'].removesuffix('.weight')})")]


def _left_out(entries: Sequence[Row]) -> Pairs:
    """A line for each reason, with its names drawn together and their share of the change."""
    reasons: dict[str, list[Row]] = {}
    for entry in entries:
        reasons.setdefault(entry["reason"], []).append(entry)
    pairs: Pairs = []
    for reason, rows in reasons.items():
        patterns = [pattern for pattern, _ in grouped(sorted((row["name"] for row in rows), key=natural))]
        more = f" and {len(patterns) - NAMED} more" if len(patterns) > NAMED else ""
        shares = [row["share"] for row in rows if row.get("share") is not None]
        lost = f", {percent(math.fsum(shares))} of the change's energy" if shares else ""
        pairs.append(("left out", f"{', '.join(patterns[:NAMED])}{more}: {reason}{lost}"))
    return pairs


def _ending(receipt: Row, out: str) -> Pairs:
    files = receipt["outputs"]
    weights = [entry for entry in files if entry["header_sha256"] is not None]
    others = len(files) - len(weights)
    text = f"{size(sum(entry['bytes'] for entry in files))}: {many(len(weights), 'file of weights', 'files of weights')}"
    pairs = [("on disk", text + (f", {many(others, 'other')}" if others else ""))]
    pairs += [("edited", ", ".join(receipt["changed_files"]))] if receipt["changed_files"] else []
    receipt_at = receipt_path(Path(out), folder=Path(out).is_dir())
    return [*pairs, ("receipt", str(receipt_at)), ("took", f"{receipt['seconds']:.1f} s")]
