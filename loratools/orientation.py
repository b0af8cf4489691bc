"""How an adapter's weights lie in a base, as its (out, in) or transposed: by shape, else by what the model or the user says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.laid import Turned, Unsettled, WherePresent, turned
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, LoratoolsError
from loratools.families import Family
from loratools.refs import Spec


def settle(
    deltas: Mapping[str, Delta], base: Mapping[str, Spec], family: Family, *, flagged: bool = False
) -> tuple[dict[str, Delta], list[LoratoolsError]]:
    """The deltas with every `unknown` orientation decided: by shape, squares by the model's type or the user's globs.

    peft saves only the flag of the last module it wrapped, so the flag of the file (`flagged`) decides no single weight. Where
    neither table nor user says which are transposed a square is linear, unless the flag or another weight of the same adapter
    shows that the model stores some transposed.
    """
    by_shape = {name: _orientation(delta, base[name]) for name, delta in deltas.items() if _open(delta) and name in base}
    mixed = (flagged or "transposed" in by_shape.values()) and not family.tells_transposed
    settled, faults = {}, list[LoratoolsError]()
    for name, delta in deltas.items():
        layer = by_shape.get(name)
        if layer == "either":
            layer = "transposed" if family.transposed(name) else "linear"
            if mixed:
                rows, columns = base[name].matrix
                what = "a square weight" if rows == columns else "a weight that takes its change both ways"
                faults.append(
                    AmbiguousError(
                        f"{what} of a model that stores some weights transposed, and no known model_type to tell which",
                        tensor=name, remedy="name the transposed ones with --transposed GLOB, or add the base's config.json",
                    )
                )  # fmt: skip
        settled[name] = delta if layer is None else oriented(delta, layer)
    return settled, faults


def _open(delta: Delta) -> bool:
    """Whether it waits for a base to tell how its weight lies, or whether there is one."""
    if isinstance(delta, Chain):
        return _open(delta.then)
    inner = delta.direction if isinstance(delta, DoRA) else delta
    return isinstance(inner, Unsettled | WherePresent) or (isinstance(inner, LowRank) and inner.layer == "unknown")


def _orientation(delta: Delta, base: Spec) -> str:
    """`linear`, `transposed`, or `either` where a weight takes it both ways."""
    if isinstance(delta, Chain):
        return _orientation(delta.then, base)
    if isinstance(delta, WherePresent) or len(base.shape) != 2:
        return "linear"
    if isinstance(delta, Unsettled) and delta.transposed is not None:
        return "transposed" if delta.transposed else "linear"
    inner = delta.delta if isinstance(delta, Unsettled) else delta.direction if isinstance(delta, DoRA) else delta
    other = replace(base, shape=base.shape[::-1])
    if inner.fits(other):
        return "either" if inner.fits(base) else "transposed"
    return "linear"


def oriented(delta: Delta, layer: str) -> Delta:
    """A delta of unknown orientation as one of `layer`: a transposed weight takes the turned delta."""
    if isinstance(delta, Chain):
        return replace(delta, then=oriented(delta.then, layer))
    if isinstance(delta, Unsettled | WherePresent):
        return turned(delta.delta) if layer == "transposed" else delta.delta
    made = turned(delta) if layer == "transposed" and isinstance(delta, (LowRank, DoRA)) else delta
    if isinstance(made, DoRA) and isinstance(made.direction, LowRank):
        return replace(made, direction=replace(made.direction, layer=layer))
    return replace(made, layer=layer) if isinstance(made, LowRank) else made


def is_turned(delta: Delta) -> bool:
    """Whether its weight is stored transposed."""
    inner = delta.direction if isinstance(delta, DoRA) else delta
    return isinstance(inner, Turned) or (isinstance(inner, LowRank) and inner.layer == "transposed")
