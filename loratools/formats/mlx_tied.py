"""A head that is its embedding: MLX's model has one module for the two, so that what changes the one changes the other alike.

Read from `Model.__call__` of mlx-lm's models/*.py and `LoRAEmbedding.as_linear`, `DoRAEmbedding.as_linear` of its tuner. peft's LoRA on a
tied embedding leaves the head as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible
from loratools.families import Family
from loratools.formats._pieces import same
from loratools.refs import Spec

_TABLES = ("model.embed_tokens.weight", "transformer.wte.weight")


def both(deltas: Mapping[str, Delta], base: Mapping[str, Spec], family: Family) -> Mapping[str, Delta]:
    """The deltas with that of a tied embedding on its head too; `base` has the head under its name, be it on disk or not."""
    pairs = [(embedding, head) for embedding, head in family.ties(base) if embedding in deltas and head not in deltas]
    return {**deltas, **{head: _of_head(deltas[embedding]) for embedding, head in pairs}}


def _of_head(delta: Delta) -> Delta:
    """An embedding's change as one of a linear layer with the same weight."""
    if isinstance(delta, DoRA) and isinstance(delta.direction, LowRank):
        return replace(delta, direction=replace(delta.direction, layer="linear"))
    return replace(delta, layer="linear") if isinstance(delta, LowRank) else delta


def spoken(adapter: Adapter) -> dict[str, Delta]:
    """The deltas that MLX has modules for. Raises NotExpressible where a tied embedding and its head are changed in ways that differ."""
    deltas = dict(adapter)
    tied = Family(adapter.model).tied({*deltas, *_TABLES}) if adapter.model else None
    here = [name for name in tied or () if name in deltas]
    if tied and here:
        if len(here) == 1 or not _alike(deltas[tied[0]], deltas[tied[1]]):
            how = f"{here[0]} alone" if len(here) == 1 else "each in a way of its own"
            fact = f"MLX has one module for {tied[0]} and {tied[1]}, which are tied, and the adapter changes {how}"
            raise NotExpressible(fact, file=adapter.path, tensor=here[0], remedy="merge --untie makes a model of two")
        del deltas[tied[1]]
    return deltas


def _alike(one: Delta, other: Delta) -> bool:
    if isinstance(one, DoRA) and isinstance(other, DoRA):
        pair = (one.magnitude, other.magnitude.reshape(*one.magnitude.spec.shape))
        return one.axis == other.axis and same(*pair) and _alike(one.direction, other.direction)
    if not isinstance(one, LowRank) or not isinstance(other, LowRank):
        return False
    return one.scaling == other.scaling and same(one.A, other.A) and same(one.B, other.B)
