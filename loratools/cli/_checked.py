"""What a runtime would lose of an adapter, as a person reads it: one paragraph a rule, then what to do."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from loratools.cli._numbers import many, percent
from loratools.cli._table import facts
from loratools.names import grouped

Row = Mapping[str, Any]
VERBS = {"refuse": "refuses", "ignore": "ignores", "mis-scale": "mis-scales"}
COLORS = {"refuse": "red", "ignore": "red", "mis-scale": "yellow"}
SHOWN = 4  # patterns of names in one paragraph


def checked(found: Row, columns: int | None, *, base: str | None = None) -> list[str]:
    """The document of `check` as lines for so many columns."""
    pairs = [("adapter", f"{found['path']}: {many(found['tensors'], 'delta')}, {found['format'] or 'in memory'}")]
    if found["clean"]:
        return facts([*pairs, ("clean", f"{found['title']} takes all of it, by {many(found['rules'], 'rule')}")], columns)
    lines = facts([*pairs, ("for", f"{found['title']}, which does not take all of it")], columns)
    rules = list(dict.fromkeys(row["rule"] for row in found["findings"]))
    by_rule = [[row for row in found["findings"] if row["rule"] == rule] for rule in rules]
    for rows in sorted(by_rule, key=lambda rows: list(VERBS).index(rows[0]["kind"])):
        lines += ["", *facts(_paragraph(rows, bool(found["unmeasured"])), columns, color=COLORS[rows[0]["kind"]])]
    return [*lines, "", *facts([("remedy", _remedy(found, base))], columns)]


def _paragraph(rows: list[Row], partly: bool) -> list[tuple[str, str]]:
    """What is lost and how much of it, where, and who says so."""
    first = rows[0]
    patterns = grouped([row["tensor"] for row in rows], {row["tensor"]: row["found"] for row in rows})
    said = {row["tensor"]: row["found"] for row in rows}
    places = [f"{pattern}{f': {said[names[0]]}' if said[names[0]] else ''}" for pattern, names in patterns]
    more = [f"… and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
    source = first["source"]
    return [
        (VERBS[first["kind"]], first["reason"]),
        *(("", place) for place in [*places[:SHOWN], *more]),
        ("", f"{many(len(rows), 'place')}: {_weight(rows, partly)}" if len(rows) > 1 else _weight(rows, partly)),
        ("", f"read from {source['project']} {source['version']}, {source['file']}: {source['where']}"),
    ]


def _weight(rows: list[Row], partly: bool) -> str:
    unknown = next((row["unmeasured"] for row in rows if row["share"] is None), None)
    if unknown is not None:
        return f"share of ΔW unknown: {unknown}"
    held = percent(min(1.0, sum(row["share"] for row in rows)))
    return f"{held} of ‖ΔW‖²{', of what can be measured without the base' if partly else ''}"


def _remedy(found: Row, base: str | None) -> str:
    """The command that writes it as the target takes it, or that there is none."""
    hopeless = [row for row in found["findings"] if row["fit"] == "none"]
    if hopeless:
        told = dict.fromkeys(row["remedy"] for row in hopeless if row["remedy"])
        return "; ".join(told) or "none that keeps it an adapter: merge it into the base with loratools merge, and run that"
    needs = found["target"] == "llama.cpp" or any(row["fit"] in ("lora", "beside") or row["remedy"] for row in found["findings"])
    more = f" --base {shlex.quote(base)}" if base else " --base BASE" if needs else ""
    return f"loratools fit {shlex.quote(found['path'])} -o OUT --for {found['target']}{more}"
