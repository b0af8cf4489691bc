"""Lines of text for a terminal of a given width, or for a pipe, where nothing is cut or broken.

Rich draws the progress bar; importing it for a few aligned columns would double what `inspect` takes to start.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence

import click

GAP = "  "
NARROW = 20  # a column of names below this width is no use: they get lines of their own


def width() -> int | None:
    """The columns of the terminal that stdout is, None for a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def facts(pairs: Iterable[tuple[str, str]], columns: int | None, *, color: str | None = None) -> list[str]:
    """Labels and what they say, one below the other; a label that is empty continues the one before.

    >>> facts([("rank", "8"), ("on disk", "2.13 MB")], None)
    ['rank     8', 'on disk  2.13 MB']
    """
    listed = list(pairs)
    wide = max((len(label) for label, _ in listed), default=0)
    lines = []
    for label, text in listed:
        room = max(NARROW, columns - wide - len(GAP)) if columns else None
        parts = textwrap.wrap(text, room, break_on_hyphens=False) if room and len(text) > room else [text]
        for place, part in enumerate(parts or [""]):
            lines.append(_dim(f"{label if place == 0 else '':<{wide}}", color) + GAP + part)
    return lines


def table(cells: Mapping[str, Sequence[str]], columns: int | None, words: Collection[str] = ()) -> list[str]:
    """Columns by title: the first of names, `words` to the left, all others numbers, to the right.

    Where a name leaves no room for its numbers, they stand below it.

    >>> table({"name": ["a", "bcd"], "size": ["1", "10"]}, None)
    ['name  size', 'a        1', 'bcd     10']
    """
    (first, names), *others = cells.items()
    sizes = [max(map(len, (title, *column))) for title, column in others]
    longest, taken = max(map(len, (first, *names))), sum(sizes) + len(GAP) * len(sizes)
    room = longest if columns is None else min(longest, columns - taken)
    fitting = sum(len(name) <= room for name in names)
    room = room if room >= min(NARROW, longest) and 2 * fitting >= len(names) else len(GAP)
    lines: list[str] = []
    for name, *row in zip((first, *names), *((title, *column) for title, column in others), strict=True):
        head = not lines
        pairs = zip(others, row, sizes, strict=True)
        aligned = [f"{cell:<{size}}" if title in words else f"{cell:>{size}}" for (title, _), cell, size in pairs]
        numbers = GAP.join(("", *aligned)).rstrip()
        paint = _dim if head else _bold
        if len(name) > room:
            lines += [paint(name), f"{'':<{room}}" + (_dim(numbers) if head else numbers)]
        else:
            lines.append(paint(f"{name:<{room}}" if numbers else name) + (_dim(numbers) if head else numbers))
    return lines


def fitting(
    cells: Mapping[str, Sequence[str]], columns: int | None, spare: Iterable[str]
) -> tuple[dict[str, Sequence[str]], list[str]]:
    """The columns without as many of `spare`, the first ones first, as leave the numbers no room in a line; and which those are.

    >>> fitting({"name": ["a"], "σ": ["1.234"], "size": ["10"]}, 10, ["σ"])[1]
    ['σ']
    """
    kept, dropped = dict(cells), list[str]()
    for title in spare:
        taken = sum(max(map(len, (name, *column))) + len(GAP) for name, column in list(kept.items())[1:])
        if columns is None or len(GAP) + taken <= columns:
            break
        if title in kept:
            dropped.append(title)
            del kept[title]
    return kept, dropped


def _dim(text: str, color: str | None = None) -> str:
    return _styled(text, fg=color) if color else _styled(text, dim=True)


def _bold(text: str) -> str:
    return _styled(text, bold=True)


def _styled(text: str, *, fg: str | None = None, bold: bool | None = None, dim: bool | None = None) -> str:
    """With the codes of a terminal only where there is one, so that a text's length is what is seen of it."""
    return click.style(text, fg=fg, bold=bold, dim=dim) if text.strip() and sys.stdout.isatty() else text
