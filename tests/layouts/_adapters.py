"""Adapters of tiny diffusion networks under either side's names: a change of every tensor that has rows, as their files have it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loratools.deltas.base import Delta
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn


def low(rows: int, width: int = 4, *, seed: int = 0, rank: int = 2, alpha: float = 3.0, A: Tensor | None = None) -> LowRank:
    A = randn(rank, width, seed=seed) if A is None else A
    return LowRank(A=to_ref(A), B=to_ref(randn(rows, rank, seed=seed + 1)), alpha=alpha, layer="linear")


def changes(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """LoRA of matrices and convolutions, differences of all else."""
    found: dict[str, Delta] = {}
    for seed, (name, value) in enumerate(tensors.items()):
        shape = tuple(value.shape)
        if len(shape) in (2, 4) and name.endswith(".weight"):
            layer = "linear" if len(shape) == 2 else "conv"
            A, B = randn(2, *shape[1:], seed=3 * seed), randn(shape[0], 2, seed=3 * seed + 1)
            found[name] = LowRank(A=to_ref(A), B=to_ref(B), alpha=3.0, layer=layer)
        else:
            found[name] = Full(diff=to_ref(randn(*shape, seed=3 * seed)))
    return found


def dense(delta: Delta) -> Tensor:
    """ΔW in float64."""
    if isinstance(delta, Full):
        return delta.scale * read_tensor(delta.diff, torch.float64)
    assert isinstance(delta, LowRank)
    B, A = read_tensor(delta.B, torch.float64), read_tensor(delta.A, torch.float64)
    return delta.scaling * torch.einsum("or,ri->oi", B, A.flatten(1)).reshape(len(B), *A.shape[1:])


def same(one: Delta, other: Delta) -> bool:
    """Whether their factors have the same bytes, under the same scaling."""
    tensors, others = one.refs(), other.refs()
    equal = one.facts() == other.facts() and type(one) is type(other) and set(tensors) == set(others)
    return equal and all(ref.spec == others[key].spec and bytes(ref.read()) == bytes(others[key].read()) for key, ref in tensors.items())


def flat(names: Mapping[str, Delta], prefix: str) -> dict[str, Delta]:
    """The same under kohya's flat names."""
    return {f"{prefix}_{name.rpartition('.')[0].replace('.', '_')}.{name.rpartition('.')[2]}": delta for name, delta in names.items()}
