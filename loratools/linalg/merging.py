"""Sparse merging of dense changes, a block of rows at a time: what is pruned of each, which sign wins, what is added up.

    by_magnitude    the largest |δ| of the whole tensor: TIES' trim (Yadav et al. 2023, arXiv:2306.01708, section 3)
    at_random       each with the same chance, those that stay scaled up by it: DARE (Yu et al. 2023, arXiv:2311.03099, section 3)
    by_rank         a chance that rises with the rank of |δ| in its row: DELLA's MAGPRUNE (Deep et al. 2024, arXiv:2406.11617,
                    section 3), its range as mergekit 0.1 has it (`mergekit/sparsify.py`): density − ε to density + ε
    weighted_sum    Σ wᵢ·δᵢ
    elected         TIES' elect and disjoint mean: of each entry, the mean of wᵢ·δᵢ over those whose sign wins

Everything is elementwise in a fixed order, a selection, or drawn from a counter-based generator by position: the bits do not
depend on how the rows come in blocks, as long as they come in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from loratools.errors import UsageError

Blocks: TypeAlias = Callable[[], Iterable[Tensor]]  # all rows of a change in order, anew at each call
Pruner: TypeAlias = Callable[[Tensor], Tensor]  # the next block of rows -> the same rows, pruned
_DIGIT = 21  # bits of a magnitude looked at in a pass: three passes see all 63
SIGNS = ("total", "frequency")


def by_magnitude(blocks: Blocks, density: float, count: int) -> Pruner:
    """Keep the ⌊density · count⌋ entries of the largest magnitude, of equal ones those that come first; `count` is that of all.

    >>> D = torch.tensor([[3.0, -1.0], [2.0, 0.5]], dtype=torch.float64)
    >>> by_magnitude(lambda: [D], 0.5, 4)(D).tolist()
    [[3.0, 0.0], [2.0, 0.0]]
    """
    keep = int(density * count)
    if keep >= count:
        return lambda D: D
    if keep == 0:
        return lambda D: torch.zeros_like(D)
    least, left = _threshold(blocks, keep)

    def prune(D: Tensor) -> Tensor:
        nonlocal left
        D = D.contiguous()
        size = D.abs()
        kept, tied = size > least, (size == least).flatten()
        here = min(left, int(tied.sum()))
        left -= here
        kept.view(-1)[torch.nonzero(tied)[:here, 0]] = True
        return torch.where(kept, D, 0.0)

    return prune


def at_random(density: float, key: bytes) -> Pruner:
    """Keep each entry with the chance `density`, divided by it, so that the expectation stays; the same choice for the same key.

    >>> D = torch.ones(1000, 1, dtype=torch.float64)
    >>> sorted(set(at_random(0.5, b"key")(D).flatten().tolist()))
    [0.0, 2.0]
    """
    draw = _Draw(key)
    return lambda D: torch.where(draw(D.shape) < density, D / density, 0.0) if density else torch.zeros_like(D)


def by_rank(density: float, epsilon: float, key: bytes) -> Pruner:
    """Keep an entry with the chance q = density − ε + 2ε·k/(n − 1), divided by q, k being the rank of its |δ| in its row of n.

    The smallest has rank 0; of equal ones that come first it is the lower. A row of one entry has the chance `density`. Raises
    OptionError where a chance would not be between 0 and 1; a density of 1 keeps all.
    """
    if density == 1:
        return lambda D: D
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise UsageError("--density plus and minus --epsilon", found=f"{density:g} ± {epsilon:g}", expected="between 0 and 1")
    draw = _Draw(key)

    def prune(D: Tensor) -> Tensor:
        n = D.shape[1]
        order = torch.sort(D.abs(), dim=1, stable=True).indices
        place = torch.arange(n, dtype=torch.float64, device=D.device)
        steps = place * (2 * epsilon / (n - 1)) if n > 1 else place + epsilon
        chance = torch.empty_like(D).scatter_(1, order, (density - epsilon + steps).expand_as(D))
        return torch.where(draw(D.shape) < chance, D / chance, 0.0)

    return prune


def weighted_sum(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ·δᵢ of blocks of equal shape, in their order.

    >>> weighted_sum([torch.ones(1, 2), torch.ones(1, 2)], [0.5, -2.0]).tolist()
    [[-1.5, -1.5]]
    """
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += part * weight
    return total


def elected(parts: Sequence[Tensor], weights: Sequence[float], signs: str = "total") -> Tensor:
    """Of each entry the mean of wᵢ·δᵢ over the δᵢ that have the winning sign, 0 where none has.

    The sign that wins is that of Σ δᵢ ("total") or of Σ sign(δᵢ) ("frequency"), plus where that is 0. Weights have no vote, as in
    peft 0.21 (`utils/merge_utils.py`).

    >>> elected([torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, -2.0]]), torch.tensor([[-1.0, 2.0]])], [1.0, 1.0, 1.0]).tolist()
    [[2.0, -1.5]]
    """
    votes = torch.zeros_like(parts[0])
    for part in parts:
        votes += part if signs == "total" else part.sign()
    winner = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
    total, agreeing = torch.zeros_like(votes), torch.zeros_like(votes)
    for part, weight in zip(parts, weights, strict=True):
        agrees = part.sign() == winner
        total += torch.where(agrees, part * weight, 0.0)
        agreeing += agrees
    return total / agreeing.clamp_min(1)


class _Draw:
    """Numbers in [0, 1), one an entry in row-major order, from Philox4x64-10 (Salmon et al. 2011), whose raw output is fixed."""

    def __init__(self, key: bytes) -> None:
        self.bits = np.random.Philox(key=int.from_bytes(key[:16], "little"))

    def __call__(self, shape: Sequence[int]) -> Tensor:
        raw = self.bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
        return torch.from_numpy(raw.astype(np.float64) * 2.0**-53).reshape(*shape)


def _threshold(blocks: Blocks, keep: int) -> tuple[float, int]:
    """The `keep`-th largest magnitude, and how many entries that have exactly it belong to the `keep` largest.

    By digits of the bits of |δ|, which as integers are in the order of the numbers: three passes, no sort, no copy.
    """
    prefix, left = 0, keep
    for low in (2 * _DIGIT, _DIGIT, 0):
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        for D in blocks():
            bits = D.abs().contiguous().view(torch.int64).flatten()
            inside = bits[(bits >> (low + _DIGIT)) == prefix]
            counts += np.bincount(((inside >> low) & ((1 << _DIGIT) - 1)).numpy(), minlength=1 << _DIGIT)
        above = counts[::-1].cumsum()  # entries whose digit is this or larger
        place = int(np.searchsorted(above, left))
        digit = len(counts) - 1 - place
        left -= int(above[place] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
    return float(np.int64(prefix).view(np.float64)), left
