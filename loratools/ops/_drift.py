"""DoRA's magnitudes beside the base: how far they moved from the norms that training began with, and which norms they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.flat import FlatDoRA
from loratools.deltas.full import Replacement
from loratools.deltas.laid import TurnedAdditive
from loratools.deltas.lowrank import LowRank
from loratools.deltas.magnitudes import AXES, Norms, axis_of, clear, drift, fits, moves, named, norms
from loratools.errors import AmbiguousError, NonFiniteError
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from loratools.effect import Effect


class Moved(NamedTuple):
    """The fields of a report's row, what is odd about them, and m/‖W‖ − 1 of each magnitude along the axis."""

    told: dict[str, Any]
    odd: list[str]
    each: list[float]


def moved(delta: Delta, weight: Ref | None) -> Moved:
    """What a report says of a DoRA's magnitudes on a weight, read for it, and what is odd about them; nothing of other kinds.

    `axis` is `out` for one magnitude an output of the layer, `in` for one an input, None where nothing tells; `drift` the least,
    median and greatest of m/‖W‖ − 1 along it; `fits` each axis that has as many norms, with the root mean squares of m/‖W‖ − 1
    (`base`) and of m/‖W + ΔW‖ − 1 (`changed`), the nearest first.
    """
    if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
        weight, delta = delta.first.value, delta.then
    if not isinstance(delta, DoRA | FlatDoRA) or weight is None:
        return Moved({}, [], [])
    import torch

    from loratools.changes import reader
    from loratools.tensors import read_tensor

    spec = Spec("F64", weight.spec.shape)
    try:
        found = norms(spec, reader(weight, delta.matrix(spec)[1]), delta.direction)
    except NonFiniteError as error:
        return Moved({}, [f"its magnitudes are not told beside the base's norms: {error.fact}"], [])
    m = read_tensor(delta.magnitude, torch.float64).reshape(-1)
    readings, warnings = fits(m, found), list[str]()
    axis = delta.axis if isinstance(delta, DoRA) else None
    if axis is None:
        try:
            axis = axis_of(m, found) if len(readings) > 1 and m.numel() > 1 else readings[0].axis
        except AmbiguousError as error:
            warnings.append(str(error))
    elif odd := other_axis(axis, m, found):
        warnings.append(odd)
    names = {"out": "in", "in": "out"} if _turned(delta) else {"out": "out", "in": "in"}
    told: dict[str, Any] = {"axis": axis and names[axis], "drift": drift(m, found.base[axis]) if axis else None}
    told["fits"] = [{**one, "axis": names[str(one["axis"])]} for one in named(readings)]
    return Moved({"magnitudes": told}, warnings, moves(m, found.base[axis]).tolist() if axis else [])


def other_axis(axis: str, m: Any, found: Norms) -> str | None:
    """What is odd about magnitudes that clearly fit the norms of the axis they are not of: a square's vector, read another way."""
    readings = fits(m, found)
    if readings[0].axis == axis or not clear(readings, m.numel()):
        return None
    own = next(fit for fit in readings if fit.axis == axis)
    better = readings[0]
    return f"its magnitudes are read as {own}; read as one for each {AXES[better.axis]} they are off by {better.best:.3g} only"


def odd_axis(effect: Effect) -> str | None:
    """The same of a delta on its weight, which is read for it where it is square."""
    delta, spec = effect.delta, effect.wide
    if not isinstance(delta, DoRA) or len(spec.shape) != 2 or spec.shape[0] != spec.shape[1]:
        return None
    import torch

    from loratools.tensors import read_tensor

    m = read_tensor(delta.magnitude, torch.float64, effect.device).reshape(-1)
    return other_axis(delta.axis, m, norms(spec, effect.read(), delta.direction, effect.device))


def _turned(delta: DoRA | FlatDoRA) -> bool:
    """Whether the columns of the weight as it is stored are the layer's outputs."""
    inner = delta.direction
    return isinstance(inner, TurnedAdditive) or (isinstance(inner, LowRank) and inner.layer in ("embedding", "transposed"))
