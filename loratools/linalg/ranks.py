"""Rank policies: from singular values to ranks, for one module or for all modules under one budget of bytes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from loratools.errors import OptionError
from loratools.linalg._rules import Energy, Fixed, MaxError, RankRule

__all__ = ["DENSE", "Energy", "Fixed", "MaxError", "Module", "RankRule", "budget", "for_energy", "for_error"]

DENSE = -1  # in a budget's answer: keep the whole difference, it is cheaper than the factors would be
_WORK = 300_000_000  # table entries times options up to which the exact program runs: about a second


def for_energy(sigma: Tensor, total: float, *, fraction: float) -> int:
    """The smallest rank with Σσ² ≥ fraction · total, total = ‖D‖²; the length of sigma where it does not get there.

    >>> import torch
    >>> for_energy(torch.tensor([2.0, 1.0, 1.0]), 6.0, fraction=0.8)
    2
    """
    return Energy(fraction).rank(sigma, total)


def for_error(sigma: Tensor, total: float, *, fraction: float) -> int:
    """The smallest rank with ‖D − D_r‖ ≤ fraction · ‖D‖, total = ‖D‖²; the length of sigma where it does not get there.

    >>> import torch
    >>> for_error(torch.tensor([2.0, 1.0, 1.0]), 6.0, fraction=0.5)
    2
    """
    return MaxError(fraction).rank(sigma, total)


@dataclass(frozen=True, kw_only=True)
class Module:
    """What one matrix offers a budget: squared singular values, falling, at so many bytes each, or all of it at dense_bytes.

    total is ‖D‖² (the sum of sigma2 where it is not given); overhead is paid once for any rank above 0; max_rank limits the rank
    beyond the length of sigma2.
    """

    sigma2: Sequence[float]
    bytes_per_rank: int
    total: float | None = None
    dense_bytes: int | None = None
    overhead: int = 0
    max_rank: int | None = None


Option = tuple[int, float, int]  # cost in bytes, gain in squared error, rank or DENSE


def budget(spectra: Sequence[Module], capacity: int) -> list[int]:
    """A rank for each module, or DENSE, with the least total squared error in `capacity` bytes; 0 leaves a module out.

    Exact by dynamic programming where costs share a large unit; else greedy by σ² per byte along each module's convex hull, going
    on past what does not fit, which is exact where the last step taken fills the budget and close to it elsewhere.

    >>> one, two = Module(sigma2=[9.0, 1.0], bytes_per_rank=10), Module(sigma2=[5.0, 4.0], bytes_per_rank=10)
    >>> budget([one, two], 30)
    [1, 2]
    """
    if capacity < 0:
        raise OptionError("budget", found=capacity, expected="0 bytes or more")
    choices = [_options(module) for module in spectra]
    unit = math.gcd(*(cost for options in choices for cost, _, _ in options)) or 1
    if sum(map(len, choices)) * (capacity // unit + 1) <= _WORK:
        picked = _program(choices, capacity // unit, unit)
    else:
        picked = _greedy(choices, capacity)
    return [options[index][2] for options, index in zip(choices, picked, strict=True)]


def _options(module: Module) -> list[Option]:
    """Everything worth choosing, by rising cost and gain: nothing, ranks that cost less than the whole, the whole."""
    limit = min(len(module.sigma2), len(module.sigma2) if module.max_rank is None else module.max_rank)
    gains = np.concatenate([[0.0], np.cumsum(np.asarray(module.sigma2, dtype=np.float64)[:limit])])
    costs = [module.overhead * (rank > 0) + rank * module.bytes_per_rank for rank in range(limit + 1)]
    options: list[Option] = [(cost, float(gains[rank]), rank) for rank, cost in enumerate(costs)]
    if module.dense_bytes is not None:
        total = float(np.sum(module.sigma2)) if module.total is None else module.total
        options = [option for option in options if option[0] < module.dense_bytes]
        options.append((module.dense_bytes, max(total, options[-1][1] if options else 0.0), DENSE))
    return options


def _program(choices: Sequence[list[Option]], units: int, unit: int) -> list[int]:
    """Multiple-choice knapsack by dynamic programming over multiples of `unit`."""
    best = np.zeros(units + 1)
    taken = np.zeros((len(choices), units + 1), dtype=np.int32)
    for module, options in enumerate(choices):
        fresh = np.full(units + 1, -np.inf)
        for index, (cost, gain, _) in enumerate(options):
            start = cost // unit
            if start > units:
                break
            better = best[: units + 1 - start] + gain
            mask = better > fresh[start:]
            fresh[start:][mask] = better[mask]
            taken[module, start:][mask] = index
        best = fresh
    picked, left = [0] * len(choices), units
    for module in reversed(range(len(choices))):
        picked[module] = int(taken[module, left])
        left -= choices[module][picked[module]][0] // unit
    return picked


def _greedy(choices: Sequence[list[Option]], capacity: int) -> list[int]:
    """Steps along the convex hulls by gain per byte; then whatever single options still fit."""
    picked, left = [0] * len(choices), capacity
    hulls = [_hull(options) for options in choices]
    queue = [(-_rate(options, 0, hull[0]), module, 0) for module, (options, hull) in enumerate(zip(choices, hulls, strict=True)) if hull]
    heapq.heapify(queue)
    while queue:
        _, module, step = heapq.heappop(queue)
        options, index = choices[module], hulls[module][step]
        extra = options[index][0] - options[picked[module]][0]
        if extra <= left:
            picked[module], left = index, left - extra
            if step + 1 < len(hulls[module]):
                heapq.heappush(queue, (-_rate(options, index, hulls[module][step + 1]), module, step + 1))
    return _filled(choices, picked, left)


def _filled(choices: Sequence[list[Option]], picked: list[int], left: int) -> list[int]:
    """While something more fits, the best change of one module for what is left."""
    while True:
        best, change = 0.0, None
        for module, options in enumerate(choices):
            cost, gain, _ = options[picked[module]]
            for index in range(picked[module] + 1, len(options)):
                if options[index][0] - cost > left:
                    break
                if options[index][1] - gain > best:
                    best, change = options[index][1] - gain, (module, index)
        if change is None:
            return picked
        module, index = change
        left -= choices[module][index][0] - choices[module][picked[module]][0]
        picked[module] = index


def _hull(options: list[Option]) -> list[int]:
    """The options after the first on the upper convex hull of gain over cost."""
    hull = [0]
    for index in range(1, len(options)):
        while len(hull) > 1 and _rate(options, hull[-2], index) >= _rate(options, hull[-2], hull[-1]):
            hull.pop()
        if options[index][1] > options[hull[-1]][1]:
            hull.append(index)
    return hull[1:]


def _rate(options: list[Option], start: int, stop: int) -> float:
    """Gain per byte between two options."""
    return (options[stop][1] - options[start][1]) / max(1, options[stop][0] - options[start][0])
