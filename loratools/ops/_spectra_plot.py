"""Singular values of every module in one panel: a line each, and for each group of modules its median, in the group's colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from loratools.ops._figure import COLOURS, DASHES, GREY, plain
from loratools.ops._layers import place_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = len(COLOURS) * len(DASHES)
OTHERS = "others"
NOISE = 1e-13  # of a module's largest singular value: what is below is rounding
FEW = 24  # modules up to which their own lines are what is looked at


def draw_spectra(ax: Axes, spectra: Mapping[str, Sequence[float]], *, leading: bool = False) -> None:
    """σᵢ over i, logarithmic; `leading` where there are more than are shown. The legend stands to the right of the axes."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    handles = []
    longest = max(map(len, spectra.values()))
    few = len(spectra) <= FEW
    for (label, members), (colour, dashes) in zip(groups(spectra).items(), looks(), strict=False):
        colour = GREY if label == OTHERS else colour
        lines = [[(place, value) for place, value in enumerate(shown(spectra[name]), 1)] for name in members]
        lines = [line for line in lines if line]
        if not lines:
            continue
        thin = LineCollection(lines, colors=colour, linewidths=1.0 if few else 0.45, alpha=0.9 if few else 0.22, linestyles=dashes)
        ax.add_collection(thin)
        middle = medians(lines)
        marks = "o" if longest <= 8 else None
        if few and marks:
            points = [point for line in lines for point in line]
            ax.plot(*zip(*points, strict=True), linestyle="none", marker="o", markersize=2.5, color=colour)
        elif not few:
            ax.plot(*zip(*middle, strict=True), color=colour, linestyle=dashes, linewidth=1.6, marker=marks, markersize=3)
        name = f"{label} ({len(members)})" if len(members) > 1 else label
        handles.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=1.6, label=name))
    ax.set_yscale("log")
    ax.autoscale_view()
    ax.tick_params(which="minor", labelsize=6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    ax.set_xlim(0.5 if longest <= 8 else 1, longest + (0.5 if longest <= 8 else 0))
    what = "Leading singular values" if leading else "Singular values"
    plain(ax, f"{what} of ΔW" + ("" if few else " (thick: the median of a group)"), "index i", "singular value σᵢ")
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=7, frameon=False, borderaxespad=0, handlelength=2.4)


def groups(names: Mapping[str, object]) -> dict[str, list[str]]:
    """Names by the last component of their module; where there are too many groups, the smallest ones together, last.

    >>> list(groups({"h.0.attn.q.weight": 0, "h.1.attn.q.weight": 0, "h.0.up.weight": 0}))
    ['q', 'up']
    """
    labels = {name: place_of(name).module.rpartition(".")[2] for name in names}
    sizes = Counter(labels.values())
    if len(sizes) > GROUPS:
        kept = {label for label, _ in sizes.most_common(GROUPS - 1)}
        labels = {name: label if label in kept else OTHERS for name, label in labels.items()}
    made: dict[str, list[str]] = {label: [] for label in labels.values() if label != OTHERS}
    if OTHERS in labels.values():
        made[OTHERS] = []
    for name, label in labels.items():
        made[label].append(name)
    return made


def shown(sigma: Sequence[float]) -> list[float]:
    """The singular values that are no rounding and no zero, which a logarithm has no place for."""
    return [value for value in sigma if value > NOISE * sigma[0]]


def medians(lines: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The median of the lines at each place, of those that come so far."""
    return [(place, median(line[place - 1][1] for line in lines if len(line) >= place)) for place in range(1, max(map(len, lines)) + 1)]


def looks() -> list[tuple[str, Any]]:
    """A colour and a kind of line for each group."""
    return [(colour, dashes) for dashes in DASHES for colour in COLOURS]
