"""What hypothesis draws: floating dtypes, layers with their deltas, and the dense algebra they must equal.

The algebra here is written apart from loratools, on float64 tensors: W + scaling·B·A, m ∘ V/‖V‖, slices and sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain, Part, Stacked
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.tensors import to_ref

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
floats = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**16)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Drawn:
    """A delta, a weight it fits, and W ↦ W′ by plain algebra in float64."""

    delta: Delta
    W: Tensor
    dense: Callable[[Tensor], Tensor]


def low_rank(
    shape: tuple[int, ...], rank: int, seed: int, dtype: torch.dtype = torch.float32, *, rslora: bool = False, alpha: float = 3.0
) -> Drawn:
    """LoRA on a weight of that shape, and its own algebra."""
    B, A = randn(shape[0], rank, seed=seed, dtype=dtype), randn(rank, *shape[1:], seed=seed + 1, dtype=dtype)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    difference = scale * torch.einsum("or,ri->oi", B.double(), A.double().reshape(rank, -1)).reshape(shape)
    delta = LowRank(A=to_ref(A), B=to_ref(B), alpha=alpha, rslora=rslora, layer="conv" if len(shape) > 2 else "linear")
    return Drawn(delta, randn(*shape, seed=seed + 2), lambda W: W + difference)


def dora(direction: Drawn, axis: str, seed: int) -> Drawn:
    """DoRA over a direction, along outputs or inputs."""
    shape = direction.W.shape
    axes = tuple(range(1, len(shape))) if axis == "out" else (0,)
    m = 1 + randn(*(1 if i in axes else size for i, size in enumerate(shape)), seed=seed).double()

    def dense(W: Tensor) -> Tensor:
        V = direction.dense(W)
        return m * V / V.square().sum(axes, keepdim=True).sqrt()

    assert isinstance(direction.delta, LowRank | Full)
    return Drawn(DoRA(direction=direction.delta, magnitude=to_ref(m)), direction.W, dense)


shapes = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4)),
    st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def additive(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Drawn:
    """LoRA, rsLoRA or a full difference."""
    shape, seed = shape or draw(shapes), draw(seeds)
    if draw(st.integers(0, 3)) == 0:
        diff = randn(*shape, seed=seed, dtype=draw(floats))
        return Drawn(Full(diff=to_ref(diff), scale=0.5), randn(*shape, seed=seed + 2), lambda W: W + 0.5 * diff.double())
    rank, alpha = draw(st.integers(1, 9)), draw(st.sampled_from([1.0, 16.0, -2.5, 0.3]))
    return low_rank(shape, rank, seed, draw(floats), rslora=draw(st.booleans()), alpha=alpha)


@st.composite
def simple(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Drawn:
    """An additive delta, DoRA on either axis, or a replacement of the same shape."""
    inner = draw(additive(shape))
    kind = draw(st.sampled_from(["additive", "out", "in", "replacement"]))
    if kind == "replacement":
        value = randn(*inner.W.shape, seed=draw(seeds), dtype=draw(floats))
        return Drawn(Replacement(value=to_ref(value)), inner.W, lambda W: value.double())
    if kind == "additive" or (kind == "in" and inner.W.ndim > 2):
        return inner
    return dora(inner, kind, draw(seeds))


@st.composite
def deltas(draw: st.DrawFn) -> Drawn:
    """Any delta: simple ones, and the combinators over them."""
    kind = draw(st.sampled_from(["simple", "chain", "part", "stacked"]))
    first = draw(simple())
    if kind == "chain":
        then = draw(simple(tuple(first.W.shape)))
        return Drawn(Chain(first=first.delta, then=then.delta), first.W, lambda W: then.dense(first.dense(W)))
    if first.W.ndim == 2 and kind == "part":
        return part(first, draw(st.integers(0, 9)), draw(st.integers(0, 9)), draw(seeds))
    if first.W.ndim == 2 and kind == "stacked":
        members = [draw(st.one_of(st.none(), simple(tuple(first.W.shape)))) for _ in range(draw(st.integers(0, 3)))] + [first]
        return stacked(members, first.W.shape, draw(seeds))
    return first


def part(inner: Drawn, above: int, below: int, seed: int) -> Drawn:
    """A matrix delta on rows in the middle of a taller weight."""
    rows, columns = inner.W.shape
    W = randn(above + rows + below, columns, seed=seed)

    def dense(whole: Tensor) -> Tensor:
        middle = inner.dense(whole[above : above + rows])
        return torch.cat([whole[:above], middle, whole[above + rows :]])

    return Drawn(Part(delta=inner.delta, start=above, stop=above + rows), W, dense)


def stacked(members: list[Drawn | None], shape: tuple[int, ...], seed: int) -> Drawn:
    """Matrix deltas on the members of a stack."""
    W = randn(len(members), *shape, seed=seed)
    delta = Stacked(members=tuple(member and member.delta for member in members))

    def dense(whole: Tensor) -> Tensor:
        return torch.stack([member.dense(one) if member else one for member, one in zip(members, whole, strict=True)])

    return Drawn(delta, W, dense)


def of_dtype(drawn: Drawn, dtype: torch.dtype) -> Drawn:
    """The same delta on a weight of another dtype."""
    return replace(drawn, W=drawn.W.to(dtype))
