"""inspect's report as a person reads it: what holds for all in a few lines, then a row for each kind of module.

A column whose value is the same for all modules becomes part of the lines above; repeated layers become one row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loratools.cli._numbers import count, many, number, percent, size, span
from loratools.cli._table import facts, fitting, table
from loratools.names import grouped, natural

Row = Mapping[str, Any]
Cells = dict[str, list[str]]  # a table's columns by title
Lines = Sequence[tuple[str, Sequence[Row]]]  # what a line of a table stands for
WARNINGS = 10
# columns that a terminal too narrow for all of them goes without, the first ones first
SPARE = ("magnitude min", "magnitude max", "σ min", "parameters", "median", "σ max", "eff. rank", "dtype", "alpha", "‖ΔW‖")
VARYING = ("kind", "rank", "alpha", "scaling", "dtype")  # columns only where they differ


def shown(report: Row, columns: int | None, *, each: bool = False) -> list[str]:
    """The report of an adapter or a checkpoint as lines for so many columns; `each` gives every module a row."""
    if report["format"] == "checkpoint":
        from loratools.ops.inspect import tensors

        above, cells, names = _checkpoint_facts(report), _tensor_cells(tensors(report["path"]), each), []
    else:
        above, cells, names = _adapter_facts(report), _module_cells(report, each), [row["name"] for row in report["modules"]]
    kept, dropped = fitting(cells, columns, SPARE)
    lines = [*facts(above, columns), "", *table(kept, columns, words=("kind", "dtype"))]
    lines += ["", *facts([("no room", f"{', '.join(dropped)}: a wider terminal or --json has them")], columns)] if dropped else []
    told = _warnings(report["warnings"], names)
    return [*lines, "", *facts(told, columns, color="yellow")] if told else lines


# -- the lines above


def _adapter_facts(report: Row) -> list[tuple[str, str]]:
    modules = report["modules"]
    dtypes = " and ".join(dict.fromkeys(row["dtype"] for row in modules))
    lines = [
        ("adapter", report["path"]),
        ("format", f"{report['format']}, {_kinds(report['kinds'])}"),
        ("base", report["base_model"] or "not stated"),
    ]
    lines += [("rank", _ranks(report))] if report["ranks"] else []
    lines += [("scaling", _scaling(modules))] if any(row["scaling"] is not None for row in modules) else []
    lines.append(("parameters", f"{count(report['parameters'])} in {many(report['modules_total'], 'tensor')}"))
    if report["base_parameters"] is not None:
        together = report["base_parameters"] + report["parameters"]
        share = percent(report["trainable_percent"] / 100)
        lines.append(("trainable", f"{share} of {count(together)}, the base's {count(report['base_parameters'])} among them"))
    return [*lines, ("on disk", f"{size(report['bytes'])}, {dtypes}")]


def _kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{name} on {many(tensors, 'tensor')}" for name, tensors in kinds.items())


def _ranks(report: Row) -> str:
    ranks = Counter({int(rank): modules for rank, modules in report["ranks"].items()})
    if len(ranks) == 1:
        return str(next(iter(ranks)))
    told = [f"{rank} ({modules}×)" for rank, modules in ranks.most_common(4)]
    return f"{min(ranks)} to {max(ranks)}: {', '.join(told)}{', …' if len(ranks) > 4 else ''}"


def _scaling(modules: Sequence[Row]) -> str:
    low = [row for row in modules if row["alpha"] is not None and row["scaling"] is not None]
    alphas, scalings = [row["alpha"] for row in low], [row["scaling"] for row in low]
    rules = {_rule(row) for row in low}
    if len({(row["alpha"], row["rank"], row["scaling"]) for row in low}) == 1:
        rank = low[0]["rank"]
        told = {"alpha / rank": f" / rank {rank}", "alpha / √rank (rsLoRA)": f" / √{rank} (rsLoRA)", "": f" and rank {rank}, by its method"}
        return f"{span(scalings)} {'=' if rules != {''} else 'of'} alpha {span(alphas)}{told[rules.pop()]}"
    if "" in rules:
        return f"{span(scalings)} of alpha {span(alphas)}, by its method"
    rule = rules.pop() if len(rules) == 1 else "alpha / rank, or alpha / √rank (rsLoRA)"
    return f"{span(scalings)} = {rule}, alpha {span(alphas)}"


def _rule(row: Row) -> str:
    """What gives the scaling: alpha / rank where the rank is 1, nothing where it is a method's own, as of AdaLoRA's pruned ranks."""
    alpha, rank, scaling = row["alpha"], row["rank"], row["scaling"]
    if rank and math.isclose(scaling, alpha / rank, rel_tol=1e-4):  # AdaLoRA divides by rank + 1e-5
        return "alpha / rank"
    return "alpha / √rank (rsLoRA)" if rank and math.isclose(scaling, alpha / math.sqrt(rank)) else ""


def _checkpoint_facts(report: Row) -> list[tuple[str, str]]:
    dtypes = ", ".join(f"{name} ({count(tensors)}×)" if len(report["dtypes"]) > 1 else name for name, tensors in report["dtypes"].items())
    files = many(report["shards"], "file", "files" if report["components"] else "shards")
    models = [f"{name} ({count(part['parameters'])})" for name, part in (report["components"] or {}).items()]
    return [
        ("checkpoint", report["path"]),
        *([("pipeline", ", ".join(models))] if models else []),
        *([("quantised", report["quantization"])] if report["quantization"] else []),
        ("parameters", f"{count(report['parameters'])} in {many(report['tensors'], 'tensor')}"),
        ("on disk", f"{size(report['bytes'])} in {files}, {dtypes}"),
    ]


# -- the table


def _module_cells(report: Row, each: bool) -> Cells:
    modules = {row["name"]: row for row in report["modules"]}
    keys = {name: tuple(str(row[field]) for field in (*VARYING, "shape")) for name, row in modules.items()}
    lines = [(_short(pattern), [modules[name] for name in names]) for pattern, names in _rows(keys, each)]
    varying = [field for field in VARYING if len({row[field] for row in modules.values()} - {None}) > 1]
    spectra = any("sigma" in row for row in modules.values())
    columns: Cells = {"module": [name for name, _ in lines]}
    columns |= _repeats(lines)
    columns |= {"kind": [rows[0]["kind"] for _, rows in lines]} if "kind" in varying else {}
    columns["shape"] = [_dimensions(rows[0]) for _, rows in lines]
    columns |= {field: [_cell(rows[0][field]) for _, rows in lines] for field in ("rank", "alpha", "scaling") if field in varying}
    columns |= {"dtype": [rows[0]["dtype"] for _, rows in lines]} if "dtype" in varying else {}
    columns |= _measured([rows for _, rows in lines]) if spectra else {}
    columns |= _drift([rows for _, rows in lines])
    return columns | _parameters(lines)


def _tensor_cells(rows: Sequence[Row], each: bool) -> Cells:
    tensors = {row["name"]: row for row in rows}
    keys = {name: (row["dtype"], str(row["shape"])) for name, row in tensors.items()}
    lines = [(pattern, [tensors[name] for name in names]) for pattern, names in _rows(keys, each)]
    columns: Cells = {"tensor": [name for name, _ in lines]}
    columns |= _repeats(lines) | {"shape": [_dimensions(members[0]) for _, members in lines]}
    columns |= {"dtype": [members[0]["dtype"] for _, members in lines]} if len({row["dtype"] for row in rows}) > 1 else {}
    return columns | _parameters(lines)


def _repeats(lines: Lines) -> Cells:
    counts = [len(rows) for _, rows in lines]
    return {"×": [str(many) if many > 1 else "" for many in counts]} if max(counts, default=1) > 1 else {}


def _dimensions(row: Row) -> str:
    """A shape; a dash where only the base tells it, as of a method that keeps a vector or a bank."""
    return " × ".join(map(str, row["shape"])) or ("scalar" if row["parameters"] == 1 else "–")


def _parameters(lines: Lines) -> Cells:
    return {"parameters": [count(sum(row["parameters"] for row in rows)) for _, rows in lines]}


def _measured(lines: Sequence[Sequence[Row]]) -> Cells:
    """‖ΔW‖, its share of the weight, the singular values' ends and the effective rank, as ranges over the modules of a line."""
    found: dict[str, Callable[[Row], float | None]] = {
        "‖ΔW‖": lambda row: row.get("change_norm", row["norm"]),
        "‖ΔW‖/‖W‖": lambda row: row.get("relative_norm"),
        "σ max": lambda row: row["sigma"][0] if row["sigma"] else None,
        "σ min": lambda row: row["sigma"][-1] if row["sigma"] else None,
        "eff. rank": lambda row: row["effective_rank"],
        "magnitude min": lambda row: row["magnitude"]["min"] if "magnitude" in row else None,
        "magnitude max": lambda row: row["magnitude"]["max"] if "magnitude" in row else None,
    }
    cells: Cells = {}
    for title, pick in found.items():
        values = [[value for row in rows if (value := pick(row)) is not None] for rows in lines]
        if any(values):
            cells[title] = [span(line, digits=3) if line else "–" for line in values]
    return cells


def _drift(lines: Sequence[Sequence[Row]]) -> Cells:
    """How far DoRA's magnitudes moved from the base's norms, m/‖W‖ − 1, as ranges over the modules of a line."""
    cells: Cells = {}
    for title, word in (("m/‖W‖−1 min", "min"), ("median", "median"), ("max", "max")):
        told = [[row["magnitudes"]["drift"] for row in rows if (row.get("magnitudes") or {}).get("drift")] for rows in lines]
        values = [[one[word] for one in line if one[word] is not None] for line in told]
        if any(told):
            cells[title] = [span(line, digits=2) if line else "–" for line in values]
    return cells


def _rows(keys: Mapping[str, tuple[str, ...]], each: bool) -> list[tuple[str, list[str]]]:
    names = sorted(keys, key=natural)
    return [(name, [name]) for name in names] if each else grouped(names, keys)


def _short(name: str) -> str:
    return name.removesuffix(".weight")


def _cell(value: float | None) -> str:
    return "–" if value is None else number(value)


# -- warnings


def _warnings(texts: Sequence[str], names: Iterable[str]) -> list[tuple[str, str]]:
    """Warnings of single modules drawn together where they say the same, at most ten, then a count."""
    known, general, of_modules = set(names), list[str](), dict[str, list[str]]()
    for text in texts:
        name, _, rest = text.partition(": ")
        if name in known:
            of_modules.setdefault(rest, []).append(name)
        else:
            general.append(text)
    for said, modules in of_modules.items():
        patterns = [_short(pattern) for pattern, _ in grouped(sorted(modules, key=natural))]
        more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
        general.append(f"{', '.join(patterns[:3])}{more}: {said}")
    left = len(general) - WARNINGS
    return [("warning", text) for text in general[:WARNINGS]] + ([("", f"and {left} more; --json has them all")] if left > 0 else [])
