"""Combinators: one delta after another, on a part of a tensor, on each member of a stack."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Affine, Bound, Delta, Keep, Read
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.deltas.seeded import Bank


@dataclass(frozen=True, eq=False, kw_only=True)
class Chain(Delta):
    """`then` applied to what `first` made: a saved embedding, then LoRA on it."""

    kind = "chain"

    first: Delta
    then: Delta

    def spec(self, base: Spec | None) -> Spec:
        return self.then.spec(self.first.spec(base))

    def fitted(self, base: Spec) -> Self:
        return replace(self, first=self.first.fitted(base), then=self.then.fitted(self.first.spec(base)))

    @property
    def needs_base(self) -> bool:
        return self.first.needs_base

    @property
    def align(self) -> int | None:
        one, other = self.first.align, self.then.align
        return None if one is None or other is None else math.lcm(one, other)

    def matrix(self, base: Spec) -> tuple[int, int]:
        return self.then.matrix(base)

    @property
    def draws(self) -> tuple[Bank, tuple[int, ...]] | None:
        return self.then.draws

    def drawn(self, bank: Bank) -> Self:
        return replace(self, then=self.then.drawn(bank))

    def facts(self) -> dict[str, Any]:
        return self.then.facts()

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        between = self.first.spec(base)
        first = self.first.bind(base, read, device)
        same = base is not None and base.shape == between.shape

        def read_between(rows: int) -> Iterator[tuple[slice, Tensor]]:
            if same:
                yield from ((part, first(part, W)) for part, W in read(rows))
            else:
                total = between.matrix[0]
                for start in range(0, total, rows):
                    part = slice(start, min(start + rows, total))
                    yield part, first(part, None)

        then = self.then.bind(between, read_between, device)
        return lambda part, W: then(part, first(part, W))

    def refs(self) -> dict[str, Ref]:
        return {f"{place}.{name}": ref for place in ("first", "then") for name, ref in getattr(self, place).refs().items()}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, first=self.first.map(fn), then=self.then.map(fn))


@dataclass(frozen=True, eq=False, kw_only=True)
class Part(Delta):
    """`delta` on the rows [start, stop) of a tensor, the others untouched: q into a fused qkv, one expert of a stack."""

    kind = "part"

    delta: Delta
    start: int
    stop: int

    def _inner(self, base: Spec) -> Spec:
        rows, columns = self.matrix(base)
        if not 0 <= self.start < self.stop <= rows:
            raise ShapeError("a part outside the weight", found=f"rows {self.start} to {self.stop}", expected=f"within {rows}")
        count = self.stop - self.start
        return replace(base, shape=(count,) if len(base.shape) == 1 else (count, columns))

    def spec(self, base: Spec | None) -> Spec:
        if base is None:
            raise ShapeError("changes a part of a tensor that the base lacks")
        self.delta.spec(self._inner(base))
        return base

    def facts(self) -> dict[str, Any]:
        return self.delta.facts()

    @property
    def align(self) -> int | None:
        return 1 if self.delta.align == 1 else None

    def matrix(self, base: Spec) -> tuple[int, int]:
        return rows_and_columns(base)

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None

        inner = self.delta.bind(self._inner(base), self._read_part(read), device)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            low, high = max(part.start, self.start), min(part.stop, self.stop)
            if low < high:
                at = slice(low - part.start, high - part.start)
                W[at] = inner(slice(low - self.start, high - self.start), W[at].clone())
            return W

        return rows

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        inner = self.delta.affine(self._inner(base), self._read_part(read), keep, strength, device)
        if inner is None:
            return None
        columns = self.matrix(base)[1]

        def rows(part: slice) -> tuple[Tensor | None, Tensor]:
            import torch

            count = part.stop - part.start
            d = torch.zeros(count, columns, dtype=torch.float64, device=device)
            low, high = max(part.start, self.start), min(part.stop, self.stop)
            if low >= high:
                return None, d
            at = slice(low - part.start, high - part.start)
            factor, d[at] = inner(slice(low - self.start, high - self.start))
            if factor is None:
                return None, d
            a = d.new_ones(count, factor.shape[1])
            a[at] = factor
            return a, d

        return rows

    def _read_part(self, read: Read) -> Read:
        def read_part(rows: int) -> Iterator[tuple[slice, Tensor]]:
            held: list[Tensor] = []
            for part, W in read(rows):
                low, high = max(part.start, self.start), min(part.stop, self.stop)
                if low < high:
                    held.append(W[low - part.start : high - part.start].clone())
            yield from _reblock(held, rows)

        return read_part

    def refs(self) -> dict[str, Ref]:
        return self.delta.refs()

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, delta=self.delta.map(fn))


def rows_and_columns(base: Spec) -> tuple[int, int]:
    """(rows, columns) of a tensor whose axes but the last are rows, those of a vector its elements."""
    return base.matrix if len(base.shape) == 1 else (base.numel // base.shape[-1], base.shape[-1])


def _reblock(held: list[Tensor], rows: int) -> Iterator[tuple[slice, Tensor]]:
    """The pieces as blocks that begin at multiples of `rows` from the part's own start, as its norms want them."""
    import torch

    whole = torch.cat(held)
    for start in range(0, len(whole), rows):
        part = slice(start, min(start + rows, len(whole)))
        yield part, whole[part]


@dataclass(frozen=True, eq=False, kw_only=True)
class Stacked(Delta):
    """Deltas on the members of a stack (members, rows, columns); None leaves a member as it is."""

    kind = "stacked"

    members: tuple[Delta | None, ...]

    def spec(self, base: Spec | None) -> Spec:
        if base is None or len(base.shape) != 3 or base.shape[0] != len(self.members):
            found = None if base is None else list(base.shape)
            raise ShapeError("not a stack of as many members", found=found, expected=f"[{len(self.members)}, rows, columns]")
        for part in self._parts(base):
            part.spec(base)
        return base

    def _parts(self, base: Spec) -> list[Part]:
        height = base.shape[1]
        return [
            Part(delta=delta, start=index * height, stop=(index + 1) * height)
            for index, delta in enumerate(self.members)
            if delta is not None
        ]

    @property
    def align(self) -> int | None:
        return 1 if all(delta is None or delta.align == 1 for delta in self.members) else None

    def matrix(self, base: Spec) -> tuple[int, int]:
        return base.numel // base.shape[-1], base.shape[-1]

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        flat = replace(base, shape=self.matrix(base))
        bound = [part.bind(flat, read, device) for part in self._parts(base)]

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            for apply in bound:
                W = apply(part, W)
            return W

        return rows

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        flat = replace(base, shape=self.matrix(base))
        return apart([part.affine(flat, read, keep, strength, device) for part in self._parts(base)])

    def refs(self) -> dict[str, Ref]:
        pairs = [(index, delta) for index, delta in enumerate(self.members) if delta is not None]
        return {f"{index}.{name}": ref for index, delta in pairs for name, ref in delta.refs().items()}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, members=tuple(delta and delta.map(fn) for delta in self.members))


def apart(found: Sequence[Affine | None]) -> Affine | None:
    """The maps of parts whose rows lie apart as one: elsewhere each has a = 1 and d = 0. None where one of them, or all, are lacking."""
    bound = [affine for affine in found if affine is not None]
    if not bound or len(bound) < len(found):
        return None

    def rows(part: slice) -> tuple[Tensor | None, Tensor]:
        a, d = bound[0](part)
        for affine in bound[1:]:
            factor, more = affine(part)
            a = factor if a is None else a if factor is None else a * factor
            d = d.add_(more)
        return a, d

    return rows
