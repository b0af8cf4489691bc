"""One step of a relayout: a tensor that is another, rows of one that are several, several that are one, halves that change places.

Exact algebra on factors (`deltas/cut.py`): a fused LoRA's parts share its A and have their rows of B; of B's blocks along a diagonal, as
sd-scripts saves what it trained with `split_qkv`, each part is its block. Parts that share A are one LoRA of their rank again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from loratools.deltas.base import Additive, Delta
from loratools.deltas.cut import cut, stack, unstacked
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.laid import Unsettled, WherePresent, turned
from loratools.deltas.lowrank import LowRank
from loratools.deltas.scaled import Scaled
from loratools.errors import AmbiguousError, ShapeError
from loratools.layouts.networks import Pair

Shape = tuple[int, ...] | None


@dataclass(frozen=True)
class Step:
    """Tensors of the adapter that become others: one each, one several, several one; None is one that the adapter does not change."""

    names: tuple[str | None, ...]
    places: tuple[str, ...]
    pair: Pair | None = None
    weight: str | None = None  # its module's, where the adapter changes it, and of a base that has it the shape
    shape: Shape = None

    @property
    def first(self) -> str:
        """The tensor that an error is about."""
        return next(name for name in self.names if name is not None)

    def made(self, deltas: Mapping[str, Delta]) -> Iterator[tuple[str, Delta]]:
        """The deltas under their new names."""
        found = [None if name is None else deltas[name] for name in self.names]
        pair = self.pair
        if pair is None:
            yield self.places[0], _only(found)
        elif len(self.places) > 1:
            yield from zip(self.places, _split(_only(found), pair), strict=True)
        elif len(found) > 1:
            yield self.places[0], stack([delta and _settled(delta) for delta in found], _sizes(found, pair))
        elif pair.how == "turned":
            yield self.places[0], turned(_settled(_only(found)))
        elif pair.how == "swap" or (pair.how == "swap-short" and pair.swapped(self._shape(deltas))):
            yield self.places[0], _within(_only(found), _swapped)
        else:
            yield self.places[0], _only(found)

    def _shape(self, deltas: Mapping[str, Delta]) -> tuple[int, ...]:
        """Of the weight, by which it and its bias are swapped or not."""
        weight = deltas.get(self.weight or "")
        found = self.shape or (None if weight is None else shape_of(weight))
        if found is None:
            fact = "whether its halves change places only the shape of its weight tells"
            raise AmbiguousError(fact, remedy="give the base with --base")
        return found


def _only(found: Sequence[Delta | None]) -> Delta:
    (delta,) = found
    assert delta is not None
    return delta


def _settled(delta: Delta) -> Delta:
    """Weights of these networks are stored (out, in)."""
    return delta.delta if isinstance(delta, Unsettled) and not delta.transposed else delta


def _within(delta: Delta, change: Callable[[Delta], Delta]) -> Delta:
    """The change of what is inside a condition."""
    return replace(delta, delta=change(delta.delta)) if isinstance(delta, WherePresent) else change(_settled(delta))


def shape_of(delta: Delta) -> Shape:
    """That of the weight, of deltas that tell it."""
    inner = _settled(delta.delta if isinstance(delta, WherePresent) else delta)
    inner = inner.direction if isinstance(inner, DoRA) else inner
    if isinstance(inner, Replacement):
        return inner.value.spec.shape
    return inner.shape() if isinstance(inner, Additive) else None


def _rows(delta: Delta) -> int | None:
    """How many rows it changes; None of kinds that tell none, which are of all rows alike or cannot be cut."""
    inner = _settled(delta.delta if isinstance(delta, WherePresent) else delta)
    if isinstance(inner, Scaled):
        return None if inner.axis else inner.l.spec.numel
    shape = shape_of(inner)
    return None if shape is None else shape[0]


def _split(delta: Delta, pair: Pair) -> list[Delta]:
    """What is fused in the authors' file as diffusers' parts, in their order."""
    rows, count = _rows(delta), len(pair.diffusers)
    starts = (0,) * (count + 1) if rows is None else pair.starts(rows)
    if starts is None:
        shares = ":".join(map(str, pair.shares))
        fact = "its rows are not those of the fused weight's parts"
        raise ShapeError(fact, found=rows, expected=f"a multiple of {sum(pair.shares)} ({shares})")
    inner = _settled(delta)
    if isinstance(inner, LowRank):
        return list(unstacked(inner, starts))
    pieces = [_within(inner, partial(cut, start=one, stop=other)) for one, other in pairwise(starts)]
    if isinstance(inner, DoRA) and isinstance(inner.direction, LowRank):
        lows = unstacked(inner.direction, starts)
        return [replace(piece, direction=low) for piece, low in zip(pieces, lows, strict=True) if isinstance(piece, DoRA)]
    return pieces


def _sizes(found: Sequence[Delta | None], pair: Pair) -> list[int]:
    """The rows of each part, those of parts that are not there by the shares of the others."""
    rows = [None if delta is None else _rows(delta) for delta in found]
    units = {size / share for size, share in zip(rows, pair.shares, strict=True) if size is not None}
    if len(units) > 1 or any(unit != int(unit) for unit in units):
        expected = ":".join(map(str, pair.shares))
        raise ShapeError("its parts' rows are not in the shares of the fused weight", found=", ".join(map(str, rows)), expected=expected)
    unit = int(next(iter(units), 0))
    return [unit * share for share in pair.shares]


def _swapped(delta: Delta) -> Delta:
    """The halves of its rows in the other order; what is of all columns alike stays."""
    rows = _rows(delta)
    if rows is None:
        return cut(delta, 0, 0)
    half, rest = divmod(rows, 2)
    if rest:
        raise ShapeError("halves change places, and its rows are not even", found=rows)
    return stack([cut(delta, half, rows), cut(delta, 0, half)], (half, half))
