"""How much of an adapter each tensor's change is: ‖W′ − W‖, measured without the base where the kind of change allows."""

from __future__ import annotations

import math
from typing import TypeGuard

from loratools.adapter import Adapter
from loratools.deltas.base import Additive, Delta
from loratools.deltas.full import Full
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.effect import Effect, square
from loratools.errors import LoratoolsError
from loratools.ops._base import Base


def weights(adapter: Adapter, base: Base | None) -> dict[str, float | str]:
    """‖W′ − W‖ by tensor, or, where it cannot be told, why."""
    found: dict[str, float | str] = {}
    for name, delta in adapter.items():
        try:
            found[name] = _weight(name, delta, base)
        except LoratoolsError as error:
            found[name] = error.fact
    return found


def sized(delta: Delta) -> TypeGuard[Additive]:
    """Whether it is a difference whose norm it tells itself; of some kinds the sizes are only the base's to tell."""
    return isinstance(delta, Additive) and (isinstance(delta, Full) or len(delta.shape()) > 1)


def _weight(name: str, delta: Delta, base: Base | None) -> float | str:
    inner = delta.delta if isinstance(delta, Unsettled | WherePresent) else delta
    if sized(inner):
        return inner.norm()
    if base is None:
        return "how large it is depends on the base's weight: give --base"
    if name not in base:
        return "the base has no such tensor to compare it with"
    weight = base.weight(name)
    if inner.spec(weight.spec).shape != weight.spec.shape:
        return "it is of another shape than the base's"
    effect = Effect(delta=inner, spec=weight.spec, weight=weight)
    return math.sqrt(math.fsum(square(block) for block in effect.differences()))
