"""DoRA's magnitudes beside the norms of the weight: which axis they are of, and how far training moved them.

Training begins with m = ‖W‖ (Liu et al. 2024, arXiv:2402.09353, section 4.1) and moves it a little, so the norms that m fits tell
what it was divided by. Four ways to read a file are about: one norm for each row of W + ΔW (peft, LyCORIS since 3.2), one for each
column (the from-scratch tutorial, older LyCORIS, peft's embeddings), the norms of W alone (ComfyUI), and a bare vector that is
broadcast along whichever axis it meets first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.base import Additive, Read
from loratools.errors import AmbiguousError
from loratools.refs import Spec

if TYPE_CHECKING:
    from torch import Tensor

AXES = {"out": "row", "in": "column"}  # of the weight as it is stored
CLEAR = 2.0  # times as near as the other reading: below, both could be
ODDS = math.log(1e6)  # and a million times as likely, were the deviations normal: a handful of numbers can fit by chance


@dataclass(frozen=True)
class Norms:
    """‖W‖ and ‖W + ΔW‖ of each row (`out`) and each column (`in`), in float64; a convolution's columns are its input channels."""

    base: Mapping[str, Tensor]
    changed: Mapping[str, Tensor]


def norms(spec: Spec, read: Read, direction: Additive, device: str = "cpu") -> Norms:
    """All four from one pass over W, the same bits on any number of threads.

    >>> import torch
    >>> from loratools.deltas.full import Full
    >>> from loratools.tensors import to_ref
    >>> W, none = torch.tensor([[3.0, 4.0]], dtype=torch.float64), Full(diff=to_ref(torch.zeros(1, 2)))
    >>> norms(Spec("F64", (1, 2)), lambda rows: iter([(slice(0, 1), W)]), none).base["out"].tolist()
    [5.0]
    """
    import torch

    from loratools.linalg.norms import ROWS, column_squares, row_squares, row_sums

    direct = direction.bind(spec, read, device)
    rows: tuple[list[Tensor], list[Tensor]] = [], []
    columns = [torch.zeros(spec.matrix[1], dtype=torch.float64, device=device) for _ in rows]
    for part, W in read(ROWS):
        for side, block in enumerate((W, direct(part, W.clone()))):
            rows[side].append(row_squares(block))
            columns[side] = columns[side] + column_squares([block])
    kernel = math.prod(spec.shape[2:])
    if kernel != 1:
        columns = [row_sums(total.reshape(-1, kernel)) for total in columns]
    return Norms(*({"out": torch.cat(parts).sqrt(), "in": total.sqrt()} for parts, total in zip(rows, columns, strict=True)))


@dataclass(frozen=True)
class Fit:
    """How far magnitudes are from the norms along one axis: the root mean square of m/‖W‖ − 1 and of m/‖W + ΔW‖ − 1."""

    axis: str
    base: float
    changed: float

    @property
    def best(self) -> float:
        return min(self.base, self.changed)

    def __str__(self) -> str:
        return f"one for each {AXES[self.axis]}, off ‖W‖ by {self.base:.3g} and ‖W + ΔW‖ by {self.changed:.3g}"


def fits(m: Tensor, found: Norms) -> list[Fit]:
    """A reading for each axis that has as many norms as there are magnitudes, the nearest first."""
    axes = [axis for axis, norm in found.base.items() if norm.numel() == m.numel()]
    made = [Fit(axis, _off(m, found.base[axis]), _off(m, found.changed[axis])) for axis in axes]
    return sorted(made, key=lambda fit: fit.best)


def clear(readings: Sequence[Fit], count: int) -> bool:
    """Whether the first reading is so much nearer than the next, for so many magnitudes, that it is the one meant.

    >>> clear([Fit("out", 0.01, 0.01), Fit("in", 0.3, 0.3)], 64), clear([Fit("out", 0.1, 0.1), Fit("in", 0.11, 0.12)], 4096)
    (True, False)
    """
    if len(readings) < 2:
        return len(readings) == 1
    near, far = readings[0].best, readings[1].best
    if not near < far:
        return False
    ratio = far / near if near else math.inf
    return ratio >= CLEAR and count * math.log(ratio) >= ODDS


def axis_of(m: Tensor, found: Norms) -> str:
    """The axis that a bare vector of magnitudes is of. Raises AmbiguousError, with both readings' numbers, where neither is clear."""
    readings = fits(m, found)
    if not clear(readings, m.numel()):
        raise AmbiguousError(
            f"{m.numel()} DoRA magnitudes without an axis, on a weight with as many rows as columns",
            found="; or ".join(map(str, readings)), expected=f"one reading at least {CLEAR:g} times as near as the other",
            remedy="store them as (n, 1) or (1, n), as who made the file meant them",
        )  # fmt: skip
    return readings[0].axis


def drift(m: Tensor, norm: Tensor) -> dict[str, float | None]:
    """Least, median and greatest of m/‖W‖ − 1; None where a norm of 0 leaves no number."""
    moved = moves(m, norm)
    values = {"min": moved.min(), "median": moved.median(), "max": moved.max()}
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def moves(m: Tensor, norm: Tensor) -> Tensor:
    """m/‖W‖ − 1 of each magnitude, (n,) in float64; inf where a norm of 0 leaves no number."""
    return _ratios(m, norm) - 1


def _off(m: Tensor, norm: Tensor) -> float:
    return float(moves(m, norm).square().mean().sqrt())


def _ratios(m: Tensor, norm: Tensor) -> Tensor:
    """m/‖·‖; 0/0 is 1, for a row of zeros that stayed one."""
    import torch

    m = m.reshape(-1).to(norm.dtype)
    return torch.where((norm == 0) & (m == 0), 1.0, m / norm)


def named(readings: Iterable[Fit]) -> list[dict[str, object]]:
    """Readings as plain values, for a report."""
    return [{"axis": fit.axis, "base": _finite(fit.base), "changed": _finite(fit.changed)} for fit in readings]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
