"""Heatmaps of one number for each module of a model: layers across, the modules of a layer down, as PNG, SVG or PDF.

Purple to orange through white (ColorBrewer's PuOr) where a number has a sign, cividis where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.ops._figure import OUTSIDE, save, styled
from loratools.ops._layers import place_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.24  # inches of a cell's side where there are many
WIDE = 0.62  # and where there are few, with its number in it
FEW = 48  # cells up to which numbers are written in them
NONE = "#d0d0d0"  # a module without a value


@dataclass(frozen=True)
class Panel:
    """One map: its title, what its colours stand for, a value by tensor name (None: no value), and the least of the scale.

    The scale ends at `high`; a `low` below 0 makes it one with a middle, and a `log` one has a `low` above 0. `form` is how a number
    is written in its cell.
    """

    title: str
    label: str
    values: Mapping[str, float | None]
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    form: str = ".2f"


def draw(target: Path, panels: Sequence[Panel], *, title: str, names: Iterable[str]) -> None:
    """Draw every panel over the same grid; `names` are all tensors that have a cell, with a value or without."""
    rows, columns, cells = grid(names)
    with styled():
        save(_figure(panels, rows, columns, cells, title), target)


def grid(names: Iterable[str]) -> tuple[list[str], list[str], dict[str, tuple[int, int]]]:
    """Modules, layers, and each name's (row, column); a stack's name stands before its numbers where there are several.

    >>> grid(["h.0.q.weight", "h.1.q.weight", "h.1.up.weight", "head.weight"])[:2]
    (['q', 'up', 'head'], ['0', '1', '–'])
    """
    places = {name: place_of(name) for name in names}
    rows = list(dict.fromkeys(place.module for place in sorted(places.values(), key=lambda place: place.number is None)))
    stacks = list(dict.fromkeys(place.stack for place in places.values() if place.number is not None))
    keys = sorted({(stacks.index(place.stack), place.number) for place in places.values() if place.number is not None})
    columns: list[tuple[int, int] | None] = [*keys]
    if any(place.number is None for place in places.values()):
        columns.append(None)
    shown = [OUTSIDE if key is None else f"{stacks[key[0]]}.{key[1]}" if len(stacks) > 1 else str(key[1]) for key in columns]
    where = {None: len(columns) - 1} | {key: index for index, key in enumerate(columns)}
    cells = {
        name: (rows.index(place.module), where[None if place.number is None else (stacks.index(place.stack), place.number)])
        for name, place in places.items()
    }
    return rows, shown, cells


def _figure(
    panels: Sequence[Panel], rows: Sequence[str], columns: Sequence[str], cells: Mapping[str, tuple[int, int]], title: str
) -> Figure:
    """All panels on one page: below each other where the grid is wide, beside each other where it is tall."""
    from matplotlib.figure import Figure

    few = len(cells) <= FEW
    side = WIDE if few else CELL
    width, height = max(1.6, side * len(columns)), max(0.5, (0.3 if few else CELL) * len(rows))
    stacked = width >= height
    names, turned = 0.075 * max(map(len, rows)) + 0.5, 0.08 * max(map(len, columns)) + 0.55
    count = len(panels)
    across, down = (1, count) if stacked else (count, 1)
    size = (names + across * (width + 1.1) + 0.2, 0.6 + down * (height + 0.75) + turned)
    figure = Figure(figsize=(max(size[0], 5.5), size[1]), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    for index, (panel, ax) in enumerate(zip(panels, axes, strict=True)):
        paint(figure, ax, panel, (len(rows), len(columns)), cells, few=few)
        last = not stacked or index == count - 1
        label(ax, rows, columns, left=stacked or index == 0, below=last)
    missing = any(panel.values.get(name) is None for panel in panels for name in cells)
    figure.suptitle(title + ("\ngrey: no value, as one of the two lacks the module or has no such measure" if missing else ""), fontsize=9)
    return figure


def paint(
    figure: Figure, ax: Axes, panel: Panel, shape: tuple[int, int], cells: Mapping[str, tuple[int, int]], *, few: bool,
    bar: Axes | None = None,
) -> None:  # fmt: skip
    """One map; its scale in the axes `bar`, or beside it."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    image = np.full(shape, np.nan)
    known = {name: value for name in cells if (value := panel.values.get(name)) is not None}
    for name, value in known.items():
        image[cells[name]] = max(value, panel.low) if panel.log else value
    colours = colormaps["PuOr_r" if panel.low < 0 else "cividis"].with_extremes(bad="white")
    holes = np.zeros((*shape, 4))
    for name in cells:
        if name not in known:
            holes[cells[name]] = (*(int(NONE[at : at + 2], 16) / 255 for at in (1, 3, 5)), 1.0)
    scale = (LogNorm if panel.log else Normalize)(panel.low, panel.high)
    shown = ax.imshow(image, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
    ax.imshow(holes, aspect="auto", interpolation="nearest")
    ax.set_title(panel.title, fontsize=8 if bar is None else 8.5, loc="center" if bar is None else "left")
    ticks = [panel.low, math.sqrt(panel.low * panel.high) if panel.log else (panel.low + panel.high) / 2, panel.high]
    if bar is None:
        figure.colorbar(shown, ax=ax, label=panel.label, shrink=0.95, pad=0.02, ticks=ticks)
    else:
        told = figure.colorbar(shown, cax=bar, ticks=ticks, format=lambda value, _: f"{value:.2g}")
        told.ax.minorticks_off()
        told.ax.tick_params(labelsize=7, length=2)
        told.set_label(panel.label, fontsize=7.5)
        told.outline.set_visible(False)
    for edge in ax.spines.values():
        edge.set_visible(False)
    ax.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=0.6)
    ax.tick_params(which="both", length=0)
    for name, value in known.items() if few else ():
        red, green, blue, _ = colours(scale(max(value, panel.low)))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        row, column = cells[name]
        ax.text(column, row, f"{value:{panel.form}}", ha="center", va="center", fontsize=7, color="white" if dark else "black")


def label(ax: Axes, rows: Sequence[str], columns: Sequence[str], *, left: bool, below: bool) -> None:
    """Ticks that leave room to read them: every module, and as many layers as do not touch."""
    step = 1 if max(map(len, columns)) > 3 or len(columns) <= 50 else 2
    ax.set_xticks(range(0, len(columns), step), columns[::step], rotation=90 if max(map(len, columns)) > 2 else 0, fontsize=7)
    ax.set_yticks(range(len(rows)), rows, fontsize=7)
    ax.tick_params(labelleft=left, labelbottom=below)
    if left:
        ax.set_ylabel("module")
    if below:
        ax.set_xlabel("layer" if OUTSIDE not in columns else f"layer ({OUTSIDE}: in none)")
