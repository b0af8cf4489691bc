"""One figure of all that is known of an adapter: heatmaps above, spectra beside error against size, DoRA's magnitudes below.

Every panel is placed in inches, so two modules and four hundred are as readable, and no layout is searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.ops import _heatmap
from loratools.ops._budget_plot import Curve, draw_curve
from loratools.ops._drift_plot import draw_drift
from loratools.ops._figure import save, styled
from loratools.ops._heatmap import Panel
from loratools.ops._spectra_plot import draw_spectra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 11.0  # inches at least
CELL, HIGH = 0.21, 0.21  # of a cell where there are many
TOP, GAP, TITLE, BELOW = 0.6, 0.06, 0.3, 0.46  # above all, between rows, above an axes, below it
BAR, LEGEND = 0.95, 1.45  # right of a heatmap, of a panel with a legend
LINES = 2.75  # height of the panels of lines


@dataclass(frozen=True)
class Page:
    """What is drawn: heatmaps over the tensors of `names`; singular values and magnitudes by tensor; the curve, if there is one."""

    title: str
    told: str
    names: Sequence[str]
    heats: Sequence[Panel]
    spectra: Mapping[str, Sequence[float]] = field(default_factory=dict)
    leading: bool = False
    curve: Curve | None = None
    drift: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether nothing has a measure."""
        return not (any(value is not None for heat in self.heats for value in heat.values.values()) or self.spectra or self.drift)


def draw(target: Path, page: Page) -> None:
    """The page as a file, the same bytes each time."""
    with styled():
        save(made(page), target)


@dataclass
class _Block:
    """A panel with the room around it, in inches: left, right, height of its axes; how it is painted, given figure and corner."""

    left: float
    right: float
    high: float
    below: float
    paint: Callable[[_Sheet, Axes, tuple[float, float, float, float]], None]


def made(page: Page) -> Figure:
    """The figure, to be saved within `styled`."""
    rows, columns, cells = _heatmap.grid(page.names)
    left, below = 0.064 * max(map(len, rows), default=0) + 0.42, (0.07 * max(map(len, columns), default=0) + 0.36)
    wide, few = CELL * len(columns), len(cells) <= _heatmap.FEW and len(columns) <= 8
    halves = left + wide + BAR <= WIDTH / 2
    high = max(0.34 if few else HIGH, 0.55 / max(1, len(rows))) * len(rows)
    heats = [_Block(left, BAR, high, below, _heat(heat, rows, columns, cells, few)) for heat in page.heats]
    lines = list[_Block]()
    if page.spectra:
        lines.append(_Block(0.86, LEGEND, LINES, BELOW, lambda _, ax, __: draw_spectra(ax, page.spectra, leading=page.leading)))
    if page.curve is not None:
        curve = page.curve
        lines.append(_Block(0.86, 0.3, LINES, BELOW, lambda _, ax, __: draw_curve(ax, curve)))
    drift = [_Block(0.86, LEGEND, 2.1, 0.6, lambda _, ax, __: draw_drift(ax, page.drift))] if page.drift else []
    grouped = [heats[place : place + 2] for place in range(0, len(heats), 2)] if halves else [[heat] for heat in heats]
    grouped += [row for row in (lines, drift) if row]
    missing = any(heat.values.get(name) is None for heat in page.heats for name in cells)
    told = page.told + ("   (grey: no value)" if missing else "")
    height = TOP + sum(max(TITLE + block.high + block.below for block in row) + GAP for row in grouped)
    sheet = _Sheet(max(WIDTH, left + wide + BAR), height)
    sheet.head(page.title, told)
    down = TOP
    for row in grouped:
        share = sheet.width / max(len(row), 2 if row[0] in heats and halves else 1)
        for place, block in enumerate(row):
            sheet.put(block, place * share, down + TITLE, share)
        down += max(TITLE + block.high + block.below for block in row) + GAP
    return sheet.figure


class _Sheet:
    """A figure measured in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height, self.figure = width, height, Figure(figsize=(width, height))

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = 1 - (top + height) / self.height
        return self.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))

    def put(self, block: _Block, left: float, top: float, width: float) -> None:
        place = (left + block.left, top, width - block.left - block.right, block.high)
        block.paint(self, self.axes(*place), place)

    def head(self, title: str, told: str) -> None:
        for text, down, size, colour in ((title, 0.12, 10.5, "black"), (told, 0.34, 8, "#555555")):
            self.figure.text(0.14 / self.width, 1 - down / self.height, text, fontsize=size, color=colour, va="top", ha="left")


def _heat(
    panel: Panel, rows: Sequence[str], columns: Sequence[str], cells: Mapping[str, tuple[int, int]], few: bool
) -> Callable[[_Sheet, Axes, tuple[float, float, float, float]], None]:
    def paint(sheet: _Sheet, ax: Axes, place: tuple[float, float, float, float]) -> None:
        left, top, width, height = place
        bar = sheet.axes(left + width + 0.08, top, 0.11, height)
        _heatmap.paint(sheet.figure, ax, panel, (len(rows), len(columns)), cells, few=few, bar=bar)
        _heatmap.label(ax, rows, columns, left=True, below=True)

    return paint
