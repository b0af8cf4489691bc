"""What rescale, resize, combine and compare did, as a person reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.cli._numbers import count, many, number, percent, size, span
from loratools.cli._table import facts, table
from loratools.names import grouped
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
    before = [row["rank_before"] for row in rows if row["rank_before"] is not None]  # a LoHa, a DoRA's W' - W: of no stated rank
    told = f"{span(before)} before, " if before else ""
    pairs += [("rank", f"{told}{span(row['rank'] for row in rows)} now")] if rows else []
    held = math.fsum(row["share"] or 0.0 for row in rows)
    if held:
        squares = (math.fsum((row["share"] or 0.0) * row[which] ** 2 for row in rows) for which in ("error", "optimal_error"))
        error, best = (math.sqrt(square / held) for square in squares)
        pairs.append(("error", f"{number(error)} of ‖ΔW‖ as stored; the best possible at these ranks is {number(best)}"))
    worst = sorted(rows, key=lambda row: (-row["error"], row["name"]))[:WORST]
    cells = {
        "worst modules" if len(rows) > WORST else "module": [row["name"].removesuffix(".weight") for row in worst],
        "rank before": ["–" if row["rank_before"] is None else str(row["rank_before"]) for row in worst],
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
        ("‖ΔW‖", " and ".join("–" if total[key] is None else number(total[key]) for key in ("norm_a", "norm_b"))),
        ("cosine", _shown(total["cosine"])),
        ("distance", "–" if total["distance"] is None else f"{number(total['distance'])}, {_of(total['relative_distance'])} of a's ‖ΔW‖"),
        ("overlap", f"columns {_of(total['column_overlap'])}, rows {_of(total['row_overlap'])}; of {many(total['modules'], 'module')}"),
    ]  # fmt: skip
    pairs += [
        (f"only in {side}", ", ".join(pattern for pattern, _ in grouped(found[f"only_{side}"]))) for side in "ab" if found[f"only_{side}"]
    ]
    equal = [row["name"] for row in found["others"] if row["equal"]]
    pairs += [("equal", ", ".join(pattern for pattern, _ in grouped(equal)))] if equal else []
    pairs += [("differs", f"{row['name']}: by {_of(row['relative_distance'])}") for row in found["others"] if not row["equal"]]
    pairs += [("no measure", f"{row['name']}: {row['reason']}") for row in found["incomparable"]]
    pairs += _intruding(found["intruders"]) if "intruders" in found else []
    lines = facts(pairs, columns)
    for first, rows in (("layer", found["layers"] if len(found["layers"]) > 1 else []), ("module", modules)):
        if rows:
            lines += ["", *table(_measured(first, rows), columns)]
    if "intruders" in found and found["intruders"]["modules"]:
        lines += ["", *table(_against_base(found["intruders"]), columns)]
    return lines


_MEASURES = {"cosine": "cosine", "relative_distance": "distance / ‖ΔW‖", "column_overlap": "columns", "row_overlap": "rows"}


def _measured(first: str, rows: list[Row]) -> dict[str, list[str]]:
    """Cosine, distance and overlaps of layers, or of modules with their ranks."""
    if first == "layer":
        cells = {"layer": [row["layer"] for row in rows], "modules": [count(row["modules"]) for row in rows]}
    else:
        cells = {"module": [row["name"].removesuffix(".weight") for row in rows]}
        cells |= {"ranks": [f"{row['rank_a'] or '–'}, {row['rank_b'] or '–'}" for row in rows]}
    return cells | {title: [_of(row[key]) for row in rows] for key, title in _MEASURES.items()}


def _intruding(found: Row) -> Pairs:
    """How many intruders each adapter has, and how much of its change lies in the base's leading directions."""
    pairs = []
    for side in "ab":
        own = found[side]
        if own["modules"]:
            where = f"{count(own['with_intruders'])} of {many(own['modules'], 'module')}"
            text = f"{many(own['intruders'], 'dimension')} in {where} (top {found['top_k']}, below {number(found['epsilon'])})"
            pairs.append((f"intruders {side}", text))
            shares = [f"{place} {_share(own[f'{place}_energy'])} (chance {_share(own[f'{place}_chance'])})" for place in ("left", "right")]
            pairs.append((f"in base's top {found['top_k']}", f"{side}: {', '.join(shares)} of ‖ΔW‖²"))
    return pairs


def _against_base(found: Row) -> dict[str, list[str]]:
    """A line for each module: intruders of both, and the shares of both changes in the base's leading directions."""
    rows: dict[str, dict[str, Row]] = {}
    for row in found["modules"]:
        rows.setdefault(row["name"], {})[row["adapter"]] = row

    def both(key: str, shown: Any) -> list[str]:
        return [", ".join(shown(pair[side][key]) if side in pair else "–" for side in "ab") for pair in rows.values()]

    cells = {"module": [name.removesuffix(".weight") for name in rows], "intruders": both("intruders", str)}
    for place in ("left", "right"):
        cells[f"{place} in top {found['top_k']}"] = both(f"{place}_energy", _share)
        cells[f"{place} by chance"] = [_share(next(iter(pair.values()))[f"{place}_chance"]) for pair in rows.values()]
    return cells


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


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
