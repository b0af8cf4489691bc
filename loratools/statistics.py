"""What one tensor's pass measures for its row in the receipt: ‖W‖, ‖W′ − W‖, and on a sample what survived the rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EVERY, PROBE = 4, 1 << 14  # unless a full report is asked for, the first so many elements of one block in so many are measured


@dataclass
class Statistics:
    """What one tensor's pass measured, for its row in the receipt."""

    kinds: tuple[str, ...]
    full: bool = False
    applied: int = 0
    base: float = 0.0  # ‖W‖²
    change: float | None = None  # ‖W′ − W‖²
    sampled_change: float = 0.0
    sampled_error: float = 0.0  # ‖written − W′‖² on the sample
    same: int = 0
    sampled: int = 0
    total: int = 0

    def row(self, name: str) -> dict[str, Any]:
        """The receipt's row; shares are null where there is nothing to share (a new tensor, no change at all)."""
        change = None if self.change is None else math.sqrt(self.change)
        return {
            "name": name,
            "kind": "+".join(self.kinds) or "copy",
            "relative_norm": None if change is None or not self.base else change / math.sqrt(self.base),
            "survived": 1 - math.sqrt(self.sampled_error / self.sampled_change) if self.sampled_change else None,
            "unchanged": self.same / self.sampled if self.sampled else None,
            "sampled": self.sampled / self.total if self.total else 1.0,
        }


class Meter:
    """Fills statistics from blocks: ‖W‖² of all, the change of all where no delta tells it, survival on a sample."""

    def __init__(self, statistics: Statistics, *, whole: bool) -> None:
        self.statistics, self.whole = statistics, whole
        self.kept: Tensor | None = None
        self.rows = self.sampled = 0

    def before(self, W: Tensor | None, index: int) -> None:
        """Keep what is needed of a block that is about to be overwritten."""
        self.rows = self.sampled = 0
        if W is None:
            return
        self.statistics.base += square(W)
        if self.statistics.full or index % EVERY == 0:
            self.sampled = len(W) if self.statistics.full else min(len(W), max(1, PROBE // max(1, W.shape[1])))
        self.rows = len(W) if self.whole else self.sampled
        if self.kept is None or len(self.kept) < self.rows:
            self.kept = W.new_empty(max(self.rows, len(W) if self.whole else 0), W.shape[1])
        self.kept[: self.rows].copy_(W[: self.rows])

    def after(self, new: Tensor, out: Tensor) -> None:
        """Compare the changed block, and what was stored of it, with what was kept."""
        if not self.rows or self.kept is None:
            return
        statistics, some = self.statistics, self.sampled
        kept = self.kept[: self.rows]
        if some:
            written = out[:some].to(device=new.device, dtype=new.dtype, copy=True)  # a copy even where out is float64 itself
            statistics.sampled += written.numel()
            statistics.same += int((written == kept[:some]).sum())
            statistics.sampled_error += square(written.sub_(new[:some]))
        difference = kept.sub_(new[: self.rows])
        if some:
            statistics.sampled_change += square(difference[:some])
        if self.whole:
            statistics.change = (statistics.change or 0.0) + square(difference)


def square(values: Tensor) -> float:
    """The sum of all values' squares."""
    import torch

    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))
