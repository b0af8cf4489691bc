"""Several changes on rows of one tensor that lie apart: the experts of a stack, gate and up in one matrix."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Additive, Affine, Bound, Delta, Dense, Keep, Read
from loratools.deltas.compose import Part, apart, rows_and_columns
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor


def joined(parts: Iterable[Part]) -> Delta:
    """The parts as one change of their tensor: a difference where all of them are, so that it can be scaled and summed.

    Raises ShapeError for parts that share rows.
    """
    ordered = tuple(sorted(parts, key=lambda part: part.start))
    for one, other in pairwise(ordered):
        if other.start < one.stop:
            raise ShapeError("two changes of the same rows", found=f"rows {other.start} to {min(one.stop, other.stop)}")
    return Joined(parts=ordered) if all(isinstance(part.delta, Additive) for part in ordered) else Parts(parts=ordered)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Apart(Delta):
    """What both kinds share: parts in the order of their rows, which are those of (product of all axes but the last, last axis)."""

    parts: tuple[Part, ...]

    def matrix(self, base: Spec) -> tuple[int, int]:
        return rows_and_columns(base)

    def facts(self) -> dict[str, Any]:
        """What all parts have in common."""
        first, *others = [part.facts() for part in self.parts]
        return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}

    def refs(self) -> dict[str, Ref]:
        return {f"{part.start}.{name}": ref for part in self.parts for name, ref in part.refs().items()}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, parts=tuple(part.map(fn) for part in self.parts))


@dataclass(frozen=True, eq=False, kw_only=True)
class Parts(_Apart):
    """W′[rows of a part] = its delta(W[those rows]), other rows are W's; each is bound for all of the tensor's pass."""

    kind = "parts"

    def spec(self, base: Spec | None) -> Spec:
        if base is None:
            raise ShapeError("changes parts of a tensor that the base lacks")
        for part in self.parts:
            part.spec(base)
        return base

    @property
    def align(self) -> int | None:
        return 1 if all(part.align == 1 for part in self.parts) else None

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        bound = [part.bind(base, read, device) for part in self.parts]

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            for apply in bound:
                W = apply(part, W)
            return W

        return rows

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        return apart([part.affine(base, read, keep, strength, device) for part in self.parts])


@dataclass(frozen=True, eq=False, kw_only=True)
class Joined(_Apart, Additive):
    """W′ = W + ΔW, ΔW[rows of a part] its own difference and 0 elsewhere; a part is bound when its rows come, and let go after."""

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "+".join(dict.fromkeys(part.delta.kind for part in self.parts))

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return all(_difference(part).reproducible for part in self.parts)

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return all(_difference(part).factored for part in self.parts)

    def shape(self) -> tuple[int, ...]:
        """Rows up to the last part's end; the tensor may have more."""
        return (self.parts[-1].stop, *_difference(self.parts[-1]).shape()[1:])

    def spec(self, base: Spec | None) -> Spec:
        return Parts(parts=self.parts).spec(base)

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        columns = self.matrix(base)[1]

        def bind(index: int) -> Dense:
            part = self.parts[index]
            count = part.stop - part.start
            inner = replace(base, shape=(count,) if len(base.shape) == 1 else (count, columns))
            return _difference(part).bind_dense(inner, scale, device)

        return in_turn([(part.start, part.stop) for part in self.parts], bind, columns, device)

    def norm(self) -> float:
        return math.sqrt(math.fsum(_difference(part).norm() ** 2 for part in self.parts))


def _difference(part: Part) -> Additive:
    assert isinstance(part.delta, Additive)
    return part.delta


def in_turn(places: Sequence[tuple[int, int]], bind: Callable[[int], Dense], columns: int, device: str) -> Dense:
    """The map rows → ΔW[rows] for differences on stretches of rows, in order, and 0 between them.

    Only those whose rows are asked for are bound: a stack of experts never lies in memory as a whole.
    """
    import torch

    starts = [start for start, _ in places]
    held: dict[int, Dense] = {}
    made: list[Tensor] = []

    def rows(part: slice) -> Tensor:
        first = max(0, bisect_right(starts, part.start) - 1)
        here = [index for index in range(first, bisect_left(starts, part.stop)) if places[index][1] > part.start]
        for gone in held.keys() - set(here):
            del held[gone]
        for index in here:
            if index not in held:
                held[index] = bind(index)
        if len(here) == 1 and places[here[0]][0] <= part.start and part.stop <= places[here[0]][1]:
            return held[here[0]](slice(part.start - starts[here[0]], part.stop - starts[here[0]]))
        if not made or len(made[0]) != part.stop - part.start:
            made[:] = [torch.empty(part.stop - part.start, columns, dtype=torch.float64, device=device)]
        out = made[0].zero_()
        for index in here:
            low, high = max(part.start, starts[index]), min(part.stop, places[index][1])
            out[low - part.start : high - part.start] = held[index](slice(low - starts[index], high - starts[index]))
        return out

    return rows
