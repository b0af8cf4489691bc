"""The change of some rows of a weight, and one change from those of all its rows: q, k and v of a fused matrix.

Exact algebra on what a kind is made of. The rows of B·A are B's rows by A, so a cut LoRA keeps A and its scaling. One above the other,
changes that share A are B's one above the other; others are A's one above the other by B's along a diagonal, at the same scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from loratools.deltas.around import Around
from loratools.deltas.base import Additive, Delta, Dense
from loratools.deltas.compose import Part
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.loha import LoHa
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parts import Joined, Parts
from loratools.deltas.scaled import Scaled
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.sliced import Blocks, Sliced
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor



@dataclass(frozen=True, eq=False, kw_only=True)
class Cut(Around, Additive):
    """ΔW[start:stop] of any difference, as the change of a weight that is those rows."""

    delta: Additive
    start: int
    stop: int

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return self.delta.reproducible

    @property
    def flat(self) -> bool:  # type: ignore[override]
        return self.delta.flat

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.delta.kernel_shape

    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.delta.shape()[1:])

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        whole = replace(base, shape=(self.delta.shape()[0], *base.shape[1:]))
        dense = self.delta.bind_dense(whole, scale, device)
        return lambda part: dense(slice(part.start + self.start, part.stop + self.start))


def cut(delta: Delta, start: int, stop: int) -> Delta:
    """The change of rows [start, stop). Raises UnsupportedError for kinds whose rows depend on each other, such as norms of columns.

    >>> import torch
    >>> from loratools.tensors import to_ref
    >>> cut(LowRank(A=to_ref(torch.ones(1, 3)), B=to_ref(torch.ones(6, 1)), alpha=1.0), 2, 4).shape()
    (2, 3)
    """
    if isinstance(delta, LowRank):
        return replace(delta, B=rows_of(delta.B, start, stop))
    if isinstance(delta, Full):
        return replace(delta, diff=rows_of(delta.diff, start, stop))
    if isinstance(delta, Replacement):
        return replace(delta, value=rows_of(delta.value, start, stop))
    if isinstance(delta, LoHa) and delta.t1 is None and delta.t2 is None:
        return replace(delta, w1_a=rows_of(delta.w1_a, start, stop), w2_a=rows_of(delta.w2_a, start, stop))
    if isinstance(delta, Scaled):
        return delta if delta.axis else replace(delta, l=rows_of(delta.l.reshape(delta.l.spec.numel), start, stop))
    if isinstance(delta, DoRA) and delta.axis == "out":
        direction = cut(delta.direction, start, stop)
        assert isinstance(direction, Additive)
        return replace(delta, direction=direction, magnitude=rows_of(delta.magnitude, start, stop))
    if isinstance(delta, Additive):
        return Cut(delta=delta, start=start, stop=stop)
    axis = " along the inputs" if isinstance(delta, DoRA) else ""
    fact = f"{delta.called} delta{axis} is one of all rows of its weight, which are several tensors' here"
    raise UnsupportedError(fact, remedy="convert --kind lora with a base of the adapter's own names")


def rows_of(ref: Ref, start: int, stop: int) -> Ref:
    """Rows of a tensor, which are its first axis, read when they are asked for."""
    rows, columns = ref.spec.matrix
    return Sliced(ref.reshape(rows, columns), slice(start, stop)).reshape(stop - start, *ref.spec.shape[1:])


def stack(parts: Sequence[Delta | None], sizes: Sequence[int]) -> Delta:
    """Changes of stretches of rows as one of them all, None being none; LoRAs that share A keep it.

    Raises UnsupportedError for kinds that have no such sum, for scalings that differ, for a part that is lacking of what is no
    difference, and for tensors of different dtypes.
    """
    there = [part for part in parts if part is not None]
    if all(isinstance(part, LowRank) for part in there):
        return _stacked([part if isinstance(part, LowRank) else None for part in parts], sizes)
    if all(isinstance(part, Full) for part in there):
        scale = _one("scalings", [part.scale for part in there if isinstance(part, Full)])
        diffs = [(part.diff if isinstance(part, Full) else None, size) for part, size in zip(parts, sizes, strict=True)]
        return Full(diff=above(diffs), scale=scale)
    if len(there) < len(parts):
        fact = f"a {there[0].kind} delta of some rows of a fused weight, and none of the others"
        raise UnsupportedError(fact, remedy="convert --kind lora first")
    if all(isinstance(part, Replacement) for part in there):
        values = [(part.value, size) for part, size in zip(there, sizes, strict=True) if isinstance(part, Replacement)]
        return Replacement(value=above(values), new=all(part.new for part in there if isinstance(part, Replacement)))
    if all(isinstance(part, DoRA) and part.axis == "out" for part in there):
        doras = [part for part in there if isinstance(part, DoRA)]
        direction = stack([part.direction for part in doras], sizes)
        assert isinstance(direction, Additive)
        magnitudes = [(part.magnitude, size) for part, size in zip(doras, sizes, strict=True)]
        return DoRA(direction=direction, magnitude=above(magnitudes))
    kinds = ", ".join(dict.fromkeys(part.kind for part in there))
    raise UnsupportedError("no one change of a fused weight is these", found=kinds, remedy="convert --kind lora or --kind dense first")


def restacked(delta: Delta, rows: int) -> Delta:
    """Changes of stretches of a matrix's rows as one change of all of them, where there is one; any other delta as it is."""
    if not isinstance(delta, Joined | Parts | Part):
        return delta
    parts, sizes, row = list[Delta | None](), list[int](), 0
    for part in (delta,) if isinstance(delta, Part) else delta.parts:
        if part.start > row:
            parts.append(None)
            sizes.append(part.start - row)
        parts.append(part.delta)
        sizes.append(part.stop - part.start)
        row = part.stop
    if row < rows:
        parts.append(None)
        sizes.append(rows - row)
    try:
        return stack(parts, sizes)
    except UnsupportedError:
        return delta


def _stacked(parts: Sequence[LowRank | None], sizes: Sequence[int]) -> LowRank:
    there = [part for part in parts if part is not None]
    _one("layers", [part.layer for part in there])
    scaling = _one("scalings", [part.scaling for part in there])
    first = there[0]
    if len(there) == len(parts) and all(_same(part.A, first.A) for part in there):
        return replace(first, B=above([(part.B, size) for part, size in zip(there, sizes, strict=True)]))
    rank = sum(part.rank for part in there)
    blocks, column, row = list[tuple[Ref, int, int]](), 0, 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            blocks.append((part.B, row, column))
            column += part.rank
        row += size
    _one("dtypes", [part.B.spec.dtype for part in there])
    B = Blocks(Spec(first.B.spec.dtype, (row, rank)), tuple(blocks))
    alpha = first.alpha if rank == first.rank and not first.rslora else alpha_for(scaling, rank)
    return replace(first, A=above([(part.A, part.rank) for part in there]), B=B, alpha=alpha, rslora=False)


def alpha_for(scaling: float, rank: int) -> float:
    """The number that gives the scaling exactly when divided by the rank, where there is one."""
    near = scaling * rank
    tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in tried if alpha / rank == scaling), near)


def above(parts: Sequence[tuple[Ref | None, int]]) -> Ref:
    """Tensors one above the other, None being rows of zeros. Raises UnsupportedError for different dtypes, ShapeError for other sizes."""
    there = [(ref, size) for ref, size in parts if ref is not None]
    dtype, rest = _one("dtypes", [ref.spec.dtype for ref, _ in there]), _one("shapes", [ref.spec.shape[1:] for ref, _ in there])
    odd = next(((ref, size) for ref, size in there if ref.spec.shape[0] != size), None)
    if odd is not None:
        raise ShapeError("not as many rows as its part of the fused weight has", found=odd[0].spec.shape[0], expected=odd[1])
    blocks, row = list[tuple[Ref, int, int]](), 0
    for ref, size in parts:
        if ref is not None:
            blocks.append((ref.reshape(*ref.spec.matrix), row, 0))
        row += size
    return Blocks(Spec(dtype, (row, math.prod(rest))), tuple(blocks)).reshape(row, *rest)


def _one(what: str, found: Sequence[Any]) -> Any:
    if len(set(found)) > 1:
        remedy = "rescale --bake makes scalings 1" if what == "scalings" else None
        raise UnsupportedError(f"its parts have different {what}", found=", ".join(map(str, dict.fromkeys(found))), remedy=remedy)
    return found[0]


def _same(one: Ref, other: Ref) -> bool:
    return one is other or (one.spec == other.spec and bytes(one.read()) == bytes(other.read()))


def unstacked(delta: LowRank, starts: Sequence[int]) -> list[LowRank]:
    """A LoRA of a fused weight as one of each stretch of rows, all with its A and scaling; of B's blocks where B is nothing elsewhere.

    Trained with `split_qkv`, sd-scripts saves B as blocks along a diagonal, each with its own rows of A (`networks/lora_flux.py`).
    """
    stretches = list(pairwise(starts))
    blocks = _blocks(read_tensor(delta.B), stretches)
    if blocks is None:
        return [replace(delta, B=rows_of(delta.B, *stretch)) for stretch in stretches]
    found = []
    for (start, stop), (first, last) in zip(stretches, blocks, strict=True):
        alpha = alpha_for(delta.scaling, last - first)
        B = Sliced(delta.B, slice(start, stop), slice(first, last))
        found.append(replace(delta, A=rows_of(delta.A, first, last), B=B, alpha=alpha, rslora=False))
    return found


def _blocks(B: Tensor, stretches: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """The columns that each stretch of rows has to itself, of rows of zeros those of the first; None where they share some."""
    import torch

    used = torch.stack([B[start:stop].ne(0).any(0) for start, stop in stretches])
    size, rest = divmod(B.shape[1], len(stretches))
    even = [(part * size, part * size + size) for part in range(len(stretches))]
    if not rest and used.any() and not any(used[part, :first].any() or used[part, last:].any() for part, (first, last) in enumerate(even)):
        return even
    places = [row.nonzero().flatten().tolist() for row in used]
    spans = [(columns[0], columns[-1] + 1) for columns in places if columns]
    if len(spans) < 2 or sum(last - first for first, last in spans) != B.shape[1] or not bool((used.sum(0) == 1).all()):
        return None
    return [(columns[0], columns[-1] + 1) if columns else spans[0] for columns in places]
