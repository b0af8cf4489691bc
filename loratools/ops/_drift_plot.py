"""How far DoRA's magnitudes moved from the base's norms: quantiles of m/‖W‖ − 1 by layer, where training began at 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from loratools.ops._figure import COLOURS, OUTSIDE, plain
from loratools.ops._heatmap import grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def by_layer(ratios: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """QUANTILES of m/‖W‖ − 1 over all modules of a layer, by the layer's name as the heatmaps have it; what is no number is left out."""
    import numpy as np

    _, columns, cells = grid(ratios)
    found = {}
    for place, label in enumerate(columns):
        values = np.concatenate([np.asarray(ratios[name], dtype=np.float64) for name, (_, column) in cells.items() if column == place])
        values = values[np.isfinite(values)]
        if values.size:
            found[label] = np.quantile(values, QUANTILES).tolist()
    return found


def draw_drift(ax: Axes, ratios: Mapping[str, Sequence[float]]) -> None:
    """For each layer a thin line from least to greatest, a bar of 90 %, a darker one of the middle half, and the median, in per cent."""
    found = by_layer(ratios)
    places = list(range(len(found)))
    low, five, first, middle, third, ninety, high = ([100 * value for value in column] for column in zip(*found.values(), strict=True))
    wide = 0.7 if len(found) > 3 else 0.25
    ax.axhline(0, color="black", linewidth=0.7, zorder=1)
    ax.vlines(places, low, high, color=COLOURS[0], linewidth=0.8, label="least to greatest", zorder=2)
    spans = (("5 % to 95 %", five, ninety, "#a6cfe8", wide), ("25 % to 75 %", first, third, COLOURS[0], wide * 0.7))
    for label, bottom, top, colour, width in spans:
        heights = [end - start for start, end in zip(bottom, top, strict=True)]
        ax.bar(places, heights, width, bottom=bottom, color=colour, label=label, zorder=3)
    ax.hlines(middle, [place - wide / 2 for place in places], [place + wide / 2 for place in places],
              color=COLOURS[1], linewidth=1.8, label="median", zorder=4)  # fmt: skip
    step = max(1, len(found) // 50 + 1 if len(found) > 50 else 1)
    labels = list(found)
    plain(ax, "DoRA: drift of the magnitudes from the base's norms", "layer" if OUTSIDE not in found else f"layer ({OUTSIDE}: in none)",
          "m / ‖W‖ − 1, %")  # fmt: skip
    ax.set_xticks(places[::step], labels[::step], rotation=90 if max(map(len, labels)) > 2 else 0)
    ax.grid(visible=False, axis="x")
    ax.set_xlim(-0.8, len(found) - 0.2)
    ax.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), fontsize=7, frameon=False, borderaxespad=0)
