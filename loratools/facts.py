"""What the headers alone tell of a delta, as a row of plain values: its kind, the weight it makes, rank, alpha, scaling, size, dtype."""

from __future__ import annotations

import math
from typing import Any

from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain, Part
from loratools.deltas.dora import DoRA
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.refs import Spec


def facts_of(name: str, delta: Delta, base: Spec | None = None) -> dict[str, Any]:
    """A row by `name`, `kind`, `shape`, `rank`, `alpha`, `scaling` (None where there are none), `parameters` and `dtype`."""
    facts = delta.facts()
    dtypes = dict.fromkeys(ref.spec.dtype for ref in delta.refs().values())
    return {
        "name": name,
        "kind": delta.kind,
        "shape": list(shape_of(delta, base)),
        "rank": facts.get("rank"),
        "alpha": _known(facts.get("alpha")),
        "scaling": _known(facts.get("scaling")),
        "parameters": delta.parameters,
        "dtype": "+".join(dtypes),
    }


def _known(value: float | None) -> float | None:
    """A number; None for the nan that stands for an alpha which was not fetched."""
    return None if value is None or math.isnan(value) else value


def low_rank(delta: Delta) -> LowRank | None:
    """The factors within a delta, under whatever is wrapped around them."""
    if isinstance(delta, Chain):
        return low_rank(delta.then)
    if isinstance(delta, Part):
        return low_rank(delta.delta)
    inner = delta.direction if isinstance(delta, DoRA) else delta
    return inner if isinstance(inner, LowRank) else None


def shape_of(delta: Delta, base: Spec | None) -> tuple[int, ...]:
    """The shape of W′; without a base that of the factors' product, transposed where the model stores it so."""
    inner = delta.delta if isinstance(delta, Unsettled | WherePresent) else delta
    if base is not None or not inner.needs_base:
        return inner.spec(base).shape
    low = low_rank(delta)
    if low is not None:
        return low.shape()
    return inner.shape() if isinstance(inner, Additive) else ()
