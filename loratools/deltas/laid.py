"""How a weight lies in its file, for deltas that are told of it as a linear layer's (out, in): turned, or not known yet.

transformers' `Conv1D` stores (in, out). `Unsettled` and `WherePresent` are what a file leaves open; `Adapter.resolve` takes them off.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from loratools.deltas.around import Around
from loratools.deltas.base import Additive, Bound, Delta, Dense, Read
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.deltas.modulated import Modulated
from loratools.errors import ShapeError
from loratools.refs import Spec

if TYPE_CHECKING:
    from torch import Tensor



@dataclass(frozen=True, eq=False, kw_only=True)
class _Wrapped(Around):
    """Another delta under a condition."""

    @property
    def needs_base(self) -> bool:
        return self.delta.needs_base

    def spec(self, base: Spec | None) -> Spec:
        return self.delta.spec(base)

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        raise AssertionError("resolve the adapter first")


@dataclass(frozen=True, eq=False, kw_only=True)
class Unsettled(_Wrapped):
    """The change of a weight that may be stored transposed; `transposed` is None until something tells."""

    transposed: bool | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class WherePresent(_Wrapped):
    """The change of a tensor that a base may lack: of a bias, where it has one."""

    @property
    def needs_base(self) -> bool:
        return False


def turned(delta: Delta) -> Delta:
    """The change of Wᵀ. Raises what the kind raises that cannot be turned.

    >>> import torch
    >>> from loratools.tensors import to_ref
    >>> low = LowRank(A=to_ref(torch.ones(1, 3)), B=to_ref(torch.ones(2, 1)), alpha=1.0)
    >>> turned(low).shape()
    (3, 2)
    """
    if isinstance(delta, LowRank | DoRA):
        return delta.transposed()
    if isinstance(delta, Modulated):
        return delta.each(_turned_additive)
    return TurnedAdditive(delta=delta) if isinstance(delta, Additive) else Turned(delta=delta)


def _turned_additive(delta: Additive) -> Additive:
    return replace(delta.transposed(), layer="transposed") if isinstance(delta, LowRank) else TurnedAdditive(delta=delta)


def _flipped(base: Spec) -> Spec:
    if len(base.shape) != 2:
        raise ShapeError("only a matrix can be stored transposed", found=list(base.shape))
    return replace(base, shape=base.shape[::-1])


@dataclass(frozen=True, eq=False, kw_only=True)
class Turned(_Wrapped):
    """W′ = δ(Wᵀ)ᵀ; it sees the whole weight, which is held once in float64."""

    def spec(self, base: Spec | None) -> Spec:
        return _flipped(self.delta.spec(None if base is None else _flipped(base)))

    def fitted(self, base: Spec) -> Self:
        return replace(self, delta=self.delta.fitted(_flipped(base)))

    @property
    def align(self) -> int | None:
        return None

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        inner = _flipped(base)

        def read_turned(rows: int) -> Iterator[tuple[slice, Tensor]]:
            ((_, W),) = read(base.matrix[0])
            turn = W.T.contiguous()
            for start in range(0, len(turn), rows):
                part = slice(start, min(start + rows, len(turn)))
                yield part, turn[part]

        bound = self.delta.bind(inner, read_turned, device)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            return bound(slice(0, W.shape[1]), W.T.contiguous()).T.contiguous()

        return rows


@dataclass(frozen=True, eq=False, kw_only=True)
class TurnedAdditive(Around, Additive):
    """W′ = W + ΔWᵀ for a ΔW that is told of (out, in) and a weight stored (in, out)."""

    delta: Additive

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return self.delta.reproducible

    @property
    def factored(self) -> bool:  # type: ignore[override]
        return self.delta.factored

    def spec(self, base: Spec | None) -> Spec:
        return _flipped(self.delta.spec(None if base is None else _flipped(base)))

    def fitted(self, base: Spec) -> Self:
        return replace(self, delta=self.delta.fitted(_flipped(base)))

    def shape(self) -> tuple[int, ...]:
        return self.delta.shape()[::-1]

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        inner = _flipped(base)
        dense = self.delta.bind_dense(inner, scale, device)
        made: list[Tensor] = []

        def rows(part: slice) -> Tensor:
            if not made:
                made.append(dense(slice(0, inner.shape[0])).T.contiguous())
            return made[0][part].clone()

        return rows

    def norm(self) -> float:
        return self.delta.norm()

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        found = self.delta.product(device)
        return None if found is None else (found[1].T.contiguous(), found[0].T.contiguous())
