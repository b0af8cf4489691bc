"""inspect's report as a person reads it: what holds for all in a few lines, then a row for each kind of module.

A column whose value is the same for all modules becomes part of the lines above; repeated layers become one row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.cli._names import grouped
from loratools.cli._numbers import count, number, percent, size, span

Row = Mapping[str, Any]
Lines = Sequence[tuple[str, Sequence[Row]]]  # what a line of a table stands for
WARNINGS = 10
VARYING = ("kind", "rank", "alpha", "scaling", "dtype")  # columns only where they differ


def shown(report: Row, *, each: bool = False) -> list[RenderableType]:
    """The report of an adapter or a checkpoint as tables to print; `each` gives every module a row."""
    if report["format"] == "checkpoint":
        from loratools.ops.inspect import tensors

        return [_facts(_checkpoint_facts(report)), "", _tensor_table(tensors(report["path"]), each), *_warnings(report["warnings"], ())]
    modules = report["modules"]
    return [_facts(_adapter_facts(report)), "", _module_table(report, each), *_warnings(report["warnings"], [row["name"] for row in modules])]


# -- the lines above


def _facts(pairs: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in pairs:
        table.add_row(label, text)
    return table


def _adapter_facts(report: Row) -> list[tuple[str, str]]:
    modules = report["modules"]
    dtypes = " and ".join(dict.fromkeys(row["dtype"] for row in modules))
    facts = [
        ("adapter", report["path"]),
        ("format", f"{report['format']}, {_kinds(report['kinds'])}"),
        ("base", report["base_model"] or "not stated"),
    ]
    facts += [("rank", _ranks(report))] if report["ranks"] else []
    facts += [("scaling", _scaling(modules))] if any(row["alpha"] is not None for row in modules) else []
    facts += [("parameters", _share(report)), ("on disk", f"{size(report['bytes'])}, {dtypes}")]
    return facts


def _kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{name} on {number} {'tensor' if number == 1 else 'tensors'}" for name, number in kinds.items())


def _ranks(report: Row) -> str:
    ranks = Counter({int(rank): modules for rank, modules in report["ranks"].items()})
    if len(ranks) == 1:
        return str(next(iter(ranks)))
    told = [f"{rank} ({modules}×)" for rank, modules in ranks.most_common(4)]
    return f"{min(ranks)} to {max(ranks)}: {', '.join(told)}{', …' if len(ranks) > 4 else ''}"


def _scaling(modules: Sequence[Row]) -> str:
    low = [row for row in modules if row["alpha"] is not None]
    alphas, scalings = [row["alpha"] for row in low], [row["scaling"] for row in low]
    # alpha / rank where both are 1 is alpha / √rank too
    rs = [row for row in low if not math.isclose(row["scaling"], row["alpha"] / row["rank"])]
    if len({(row["alpha"], row["rank"], row["scaling"]) for row in low}) == 1:
        return f"{span(scalings)} = alpha {span(alphas)} / {'√' if rs else 'rank '}{low[0]['rank']}{' (rsLoRA)' if rs else ''}"
    rule = "alpha / √rank (rsLoRA)" if len(rs) == len(low) else "alpha / rank" if not rs else "alpha / rank, or alpha / √rank (rsLoRA)"
    return f"{span(scalings)} = {rule}, alpha {span(alphas)}"


def _share(report: Row) -> str:
    text = f"{count(report['parameters'])} in {count(report['modules_total'])} tensors"
    if report["base_parameters"] is None:
        return text
    return f"{text}, {percent(report['trainable_percent'] / 100)} beside the base's {count(report['base_parameters'])}"


def _checkpoint_facts(report: Row) -> list[tuple[str, str]]:
    dtypes = ", ".join(f"{name} ({count(number)}×)" if len(report["dtypes"]) > 1 else name for name, number in report["dtypes"].items())
    files = "one file" if report["shards"] == 1 else f"{report['shards']} shards"
    return [
        ("checkpoint", report["path"]),
        ("parameters", f"{count(report['parameters'])} in {count(report['tensors'])} tensors"),
        ("on disk", f"{size(report['bytes'])} in {files}, {dtypes}"),
    ]


# -- the table


def _module_table(report: Row, each: bool) -> Table:
    modules = {row["name"]: row for row in report["modules"]}
    keys = {name: tuple(str(row[field]) for field in (*VARYING, "shape")) for name, row in modules.items()}
    lines = [(_short(pattern), [modules[name] for name in names]) for pattern, names in _rows(keys, each)]
    varying = [field for field in VARYING if len({row[field] for row in modules.values()}) > 1]
    spectra = any("sigma" in row for row in modules.values())
    columns: dict[str, list[str]] = {"module": [name for name, _ in lines]}
    columns |= _repeats(lines)
    columns |= {"kind": [rows[0]["kind"] for _, rows in lines]} if "kind" in varying else {}
    columns["shape"] = [_dimensions(rows[0]) for _, rows in lines]
    columns |= {field: [_cell(rows[0][field]) for _, rows in lines] for field in ("rank", "alpha", "scaling") if field in varying}
    columns |= {"dtype": [rows[0]["dtype"] for _, rows in lines]} if "dtype" in varying else {}
    columns |= dict(zip(("‖ΔW‖", "σ max", "σ min", "eff. rank"), zip(*(_measured(rows) for _, rows in lines)), strict=True)) if spectra else {}
    return _table(columns | _parameters(lines))


def _tensor_table(rows: Sequence[Row], each: bool) -> Table:
    tensors = {row["name"]: row for row in rows}
    keys = {name: (row["dtype"], str(row["shape"])) for name, row in tensors.items()}
    lines = [(pattern, [tensors[name] for name in names]) for pattern, names in _rows(keys, each)]
    columns: dict[str, list[str]] = {"tensor": [name for name, _ in lines]}
    columns |= _repeats(lines) | {"shape": [_dimensions(members[0]) for _, members in lines]}
    columns |= {"dtype": [members[0]["dtype"] for _, members in lines]} if len({row["dtype"] for row in rows}) > 1 else {}
    return _table(columns | _parameters(lines))


def _repeats(lines: Lines) -> dict[str, list[str]]:
    counts = [len(rows) for _, rows in lines]
    return {"×": [str(many) if many > 1 else "" for many in counts]} if max(counts, default=1) > 1 else {}


def _dimensions(row: Row) -> str:
    return " × ".join(map(str, row["shape"])) or "scalar"


def _parameters(lines: Lines) -> dict[str, list[str]]:
    return {"parameters": [count(sum(row["parameters"] for row in rows)) for _, rows in lines]}


def _measured(rows: Sequence[Row]) -> list[str]:
    """‖ΔW‖, the greatest and the least singular value and the effective rank, as ranges over the rows of one line."""
    sigmas = [row["sigma"] for row in rows if row["sigma"]]
    columns = (
        [row["norm"] for row in rows if row["norm"] is not None],
        [sigma[0] for sigma in sigmas],
        [sigma[-1] for sigma in sigmas],
        [row["effective_rank"] for row in rows if row["effective_rank"] is not None],
    )
    return [span(values, digits=3) if values else "–" for values in columns]


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    """Columns by title: the first of names, words to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, title in enumerate(columns):
        words = place == 0 or title in ("kind", "dtype")
        table.add_column(title, justify="left" if words else "right", overflow="fold", no_wrap=place > 0, style="bold" if place == 0 else None)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _rows(keys: Mapping[str, tuple[str, ...]], each: bool) -> list[tuple[str, list[str]]]:
    names = sorted(keys, key=_natural)
    return [(name, [name]) for name in names] if each else grouped(names, keys)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in name.split(".")]


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _cell(value: float | None) -> str:
    return "–" if value is None else number(value)


# -- warnings


def _warnings(texts: Sequence[str], names: Iterable[str]) -> list[RenderableType]:
    """Warnings of single modules drawn together where they say the same, at most ten, then a count."""
    if not texts:
        return []
    known, general, of_modules = set(names), list[str](), dict[str, list[str]]()
    for text in texts:
        name, _, rest = text.partition(": ")
        if name in known:
            of_modules.setdefault(rest, []).append(name)
        else:
            general.append(text)
    lines = general
    for said, modules in of_modules.items():
        patterns = [_short(pattern) for pattern, _ in grouped(sorted(modules, key=_natural))]
        more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
        lines.append(f"{', '.join(patterns[:3])}{more}: {said}")
    table = _facts([("warning", line) for line in lines[:WARNINGS]])
    table.columns[0].style = "yellow"
    if len(lines) > WARNINGS:
        table.add_row("", Text(f"and {len(lines) - WARNINGS} more; --json has them all"))
    return ["", table]
