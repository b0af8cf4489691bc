"""The least error that a file of each size can have: ranks by one budget over all modules, beside one rank for all.

The squared singular values of a module fall, so taking them by gain per byte leads from one best plan to the next: at the size of each
of these no other ranks have a smaller error, and `resize --size` finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.ops._figure import COLOURS, GREY, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 16  # ranks up to which each has its dot
POINTS = 40  # of a curve, each measured by the header of its file
Plan = Mapping[str, int]


@dataclass(frozen=True)
class Spectrum:
    """σ² of a module, falling; the bytes of each rank; the greatest rank that is looked at; ‖ΔW‖², of which σ² may be a part."""

    sigma2: Sequence[float]
    per_rank: int
    most: int
    total: float


@dataclass(frozen=True)
class Curve:
    """(bytes, relative error) of the best plans, and of one rank for all, with that rank; where the adapter stands and its name."""

    best: Sequence[tuple[int, float]]
    equal: Sequence[tuple[int, float, int]]
    here: tuple[int, float]
    label: str


def curve(
    spectra: Mapping[str, Spectrum], size: Callable[[Plan], int], here: Plan, *, label: str, besides: float = 0.0,
    at: tuple[int, float] | None = None,
) -> Curve:  # fmt: skip
    """The curve of these modules; `size` tells a plan's file, `here` is the plan they have, `besides` a squared error that stays.

    `at` is the size and the error of `here`, where they are known better than the spectra tell.
    """
    tails = {name: _tails(one) for name, one in spectra.items()}
    whole = math.fsum(one.total for one in spectra.values()) + besides

    def error(plan: Plan) -> float:
        left = math.fsum([besides, *(tails[name][min(rank, len(tails[name]) - 1)] for name, rank in plan.items())])
        return math.sqrt(left / whole) if whole else 0.0

    best = [(size(plan), error(plan)) for plan in plans(spectra)]
    most = max(one.most for one in spectra.values())
    ranks = sorted({*range(1, min(most, FEW) + 1), *powers(most)})
    same = [({name: min(rank, one.most) for name, one in spectra.items()}, rank) for rank in ranks]
    return Curve(best, [(size(plan), error(plan), rank) for plan, rank in same], at or (size(here), error(here)), label)


def powers(most: int) -> list[int]:
    """1, 2, 4 … and the greatest rank, that last one alone where they would touch.

    >>> powers(12), powers(9)
    ([1, 2, 4, 8, 12], [1, 2, 4, 9])
    """
    return [*(2**power for power in range(most.bit_length()) if 2**power * 1.2 < most), most]


def plans(spectra: Mapping[str, Spectrum], points: int = POINTS) -> list[dict[str, int]]:
    """Ranks from 1 for all to the greatest for all, by gain per byte, about so many of them evenly over the bytes."""
    steps = [
        (-value / one.per_rank, place, name)
        for name, one in spectra.items()
        for place, value in enumerate(one.sigma2[: one.most])
        if place > 0
    ]
    ranks = dict.fromkeys(spectra, 1)
    made, spent = [dict(ranks)], 0
    every = sum(spectra[name].per_rank for _, _, name in steps) / max(1, points - 1)
    for _, _, name in sorted(steps):
        ranks[name] += 1
        spent += spectra[name].per_rank
        if spent >= every * len(made):
            made.append(dict(ranks))
    return made if made[-1] == ranks else [*made, dict(ranks)]


def _tails(one: Spectrum) -> list[float]:
    """The squared error of each rank from 0."""
    known, kept = one.sigma2[: one.most], [0.0]
    for value in reversed(known):
        kept.append(kept[-1] + value)
    beyond = max(0.0, one.total - kept[-1])
    beyond = beyond if beyond > 1e-15 * one.total * len(kept) else 0.0  # what the sum itself may be off by
    return [value + beyond for value in reversed(kept)]


def draw_curve(ax: Axes, found: Curve) -> None:
    """Error in per cent over size: the best plans as a line, one rank for all as dots with their ranks, and where the adapter stands."""
    largest = max(size for size, *_ in [*found.best, *found.equal, found.here])
    unit, name = (1e6, "MB") if largest >= 5e5 else (1e3, "kB")
    ax.plot(
        [size / unit for size, _ in found.best], [100 * error for _, error in found.best], color=COLOURS[0], linewidth=1.6,
        marker="o" if len(found.best) <= 3 else None, markersize=3, label="ranks by --size", zorder=3,
    )  # fmt: skip
    ax.plot(
        [size / unit for size, *_ in found.equal], [100 * error for _, error, _ in found.equal], color=GREY, linewidth=0.9,
        linestyle=(0, (4, 1.5)), marker="o", markersize=2.5, label="one rank for all (--rank)", zorder=2,
    )  # fmt: skip
    named = set(powers(max((rank for *_, rank in found.equal), default=1)))
    for size, error, rank in [point for point in found.equal if point[2] in named]:
        ax.annotate(str(rank), (size / unit, 100 * error), xytext=(3, 3), textcoords="offset points", fontsize=6.5, color="#555555")
    here = (found.here[0] / unit, 100 * found.here[1])
    ax.plot(*here, linestyle="none", marker="D", markersize=6, color=COLOURS[1], markeredgecolor="black", markeredgewidth=0.6,
            label=f"{found.label}: {here[0]:.3g} {name}, {here[1]:.3g} %", zorder=4, clip_on=False)  # fmt: skip
    plain(ax, "Error against size: what other ranks would give", f"file of weights, {name}", "error, % of ‖ΔW‖")
    ax.set_xlim(left=0)
    top = max(error for _, error, *_ in [*found.best, *found.equal, found.here])
    ax.set_ylim(0, 100 * top * 1.12 if top else 1)
    ax.legend(loc="upper right", fontsize=7, frameon=False)
