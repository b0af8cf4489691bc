"""An adapter as a short table, for a terminal, a notebook and rich: repeated layers in one row, twenty rows at most, headers alone."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Delta
from loratools.facts import facts_of
from loratools.names import grouped, natural

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 20
WORDS = ("module", "kind", "shape", "dtype")  # columns to the left, all others to the right
_FIELDS = ("kind", "shape", "rank", "alpha", "scaling", "dtype")  # rows of one line agree in these


@dataclass(frozen=True)
class Listing:
    """A line above, columns of cells by title, and how many rows were left out for there were too many."""

    title: str
    columns: Mapping[str, tuple[str, ...]]
    left: int = 0

    def rows(self) -> list[tuple[str, ...]]:
        return list(zip(*self.columns.values(), strict=True))

    def text(self) -> str:
        """Aligned columns under the title, one row a line."""
        sizes = [max(map(len, (title, *cells))) for title, cells in self.columns.items()]
        lines = [self.title]
        for row in [tuple(self.columns), *self.rows()] if self.columns else []:
            cells = zip(self.columns, row, sizes, strict=True)
            lines.append("  ".join(f"{cell:<{size}}" if title in WORDS else f"{cell:>{size}}" for title, cell, size in cells).rstrip())
        return "\n".join([*lines, *self._more()])

    def html(self) -> str:
        """The same for a notebook, every text escaped."""
        head = "".join(f"<th{_side(title)}>{html.escape(title)}</th>" for title in self.columns)
        body = ""
        for row in self.rows():
            cells = zip(self.columns, row, strict=True)
            body += "<tr>" + "".join(f"<td{_side(title)}>{html.escape(cell)}</td>" for title, cell in cells) + "</tr>\n"
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n" if self.columns else ""
        more = "".join(f"<p>{html.escape(line)}</p>\n" for line in self._more())
        return f"<div>\n<p>{html.escape(self.title)}</p>\n{table}{more}</div>"

    def rich(self) -> Table:
        """The same as a table of rich's."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        made = Table(
            title=Text(self.title), caption=Text(self._more()[0]) if self.left else None, box=SIMPLE_HEAD, title_justify="left",
            caption_justify="left", pad_edge=False, collapse_padding=True,
        )  # fmt: skip
        for title in self.columns:
            made.add_column(Text(title), justify="left" if title in WORDS else "right", overflow="fold", no_wrap=title != "module")
        for row in self.rows():
            made.add_row(*map(Text, row))
        return made

    def _more(self) -> list[str]:
        return [f"… and {self.left:,} more {'row' if self.left == 1 else 'rows'}"] if self.left else []


def listing(deltas: Mapping[str, Delta], *, path: object = None, format: str | None = None, parameters: int = 0) -> Listing:
    """The table of an adapter's deltas."""
    kinds = Counter(delta.kind for delta in deltas.values())
    told = [f"{len(deltas):,} {'tensor' if len(deltas) == 1 else 'tensors'}", f"{parameters:,} parameters"]
    told += [f"{kind} on {count:,}" for kind, count in kinds.items()] if len(kinds) > 1 else list(kinds)
    told += [text for text in (format, None if path is None else str(path)) if text]
    lines = _lines(deltas)
    left = len(lines) - ROWS + 1 if len(lines) > ROWS else 0
    shown = lines[: len(lines) - left]
    columns = {title: tuple(line[title] for line in shown) for title in (lines[0] if lines else ())}
    kept = {title: cells for title, cells in columns.items() if set(cells) - {"", "–"} or title == "module"}
    return Listing(f"Adapter: {', '.join(told)}", kept, left)


def _lines(deltas: Mapping[str, Delta]) -> list[dict[str, str]]:
    """A line of cells for each kind of module, those of repeated layers drawn together."""
    facts = {name: facts_of(name, deltas[name]) for name in sorted(deltas, key=natural)}
    keys = {name: tuple(str(row[field]) for field in _FIELDS) for name, row in facts.items()}
    return [_line(pattern, [facts[name] for name in names]) for pattern, names in grouped(facts, keys)]


def _line(pattern: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    one = rows[0]
    return {
        "module": pattern.removesuffix(".weight"),
        "×": str(len(rows)) if len(rows) > 1 else "",
        "kind": one["kind"],
        "shape": " × ".join(map(str, one["shape"])) or "–",
        **{field: "–" if one[field] is None else f"{one[field]:.4g}" for field in ("rank", "alpha", "scaling")},
        "dtype": one["dtype"],
        "parameters": f"{sum(row['parameters'] for row in rows):,}",
    }


def _side(title: str) -> str:
    return "" if title in WORDS else ' style="text-align: right"'
