"""An adapter as a target's rules see it, and what a predicate finds in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.ops._base import Base

WHOLE = "the whole adapter"


@dataclass(frozen=True)
class Hit:
    """A place that a rule found: a tensor, or a field of the config; the deltas it concerns; what was found there, what lacks beside it."""

    place: str
    names: tuple[str, ...]
    found: str | None = None
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """An adapter as the rules see it: its deltas, and, of one that was read from a file, its raw config and keys.

    `heads` are the tensors of output heads that a base ties to its embedding, `tied` the embeddings.
    """

    adapter: Adapter
    reads: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    keys: Sequence[str] = ()
    heads: frozenset[str] = field(default_factory=frozenset)
    tied: frozenset[str] = field(default_factory=frozenset)
    base: Base | None = None

    @cached_property
    def parts(self) -> list[tuple[str, Delta]]:
        """Every delta under its name; a saved tensor and what comes after it are two."""
        return [(name, part) for name, delta in self.adapter.items() for part in parts_of(delta)]

    @cached_property
    def lows(self) -> list[tuple[str, LowRank]]:
        """Every LoRA, a DoRA's direction among them."""
        inner = [(name, part.direction if isinstance(part, DoRA) else part) for name, part in self.parts]
        return [(name, part) for name, part in inner if isinstance(part, LowRank)]

    @property
    def every(self) -> tuple[str, ...]:
        return tuple(self.adapter)


def parts_of(delta: Delta) -> Iterator[Delta]:
    """What a rule calls a delta: what comes after a saved tensor by itself, without what a base would settle."""
    if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
        yield delta.first
        yield from parts_of(delta.then)
    else:
        yield delta.delta if isinstance(delta, Unsettled | WherePresent) else delta
