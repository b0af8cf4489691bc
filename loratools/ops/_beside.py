"""How large each change is beside the weight that it changes: norms of the weights, which are read for it, and of W′ − W."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from loratools.changes import reader
from loratools.checkpoint import Checkpoint
from loratools.deltas.base import Delta
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.effect import square
from loratools.errors import LoratoolsError, NonFiniteError
from loratools.ops._comparing import norm_of
from loratools.plan import supplied
from loratools.refs import Ref

UNKNOWN: dict[str, float | None] = {"weight_norm": None, "change_norm": None, "relative_norm": None}
_ROWS = 1 << 18  # elements of a block of a weight

Row = Mapping[str, Any]


def beside(
    deltas: Mapping[str, Delta], weights: Mapping[str, Ref], rows: Mapping[str, Row], progress: Callable[[int, int], None] | None = None
) -> tuple[dict[str, dict[str, float | None]], list[str]]:
    """`weight_norm` ‖W‖, `change_norm` ‖W′ − W‖ and `relative_norm`, their quotient, by tensor; None for what has none that is a number.

    `rows` are inspect's, of which a LoRA's and a difference's `norm` is taken; `weights` those of the base that may be read.
    `progress` is told (bytes of weights done, bytes in all). Returned beside it is why what should have a norm has none.
    """
    met = {name: weights[name] for name in deltas if name in weights}
    done, total = 0, sum(weight.spec.nbytes for weight in met.values())
    told, odd = {name: dict(UNKNOWN) for name in deltas}, list[str]()
    for name, delta in deltas.items():
        weight = met.get(name)
        length = _number(weight_norm(weight)) if weight is not None and weight.spec.floating else None
        told[name]["weight_norm"] = length
        try:
            told[name]["change_norm"] = change = change_norm(delta, weight, rows[name])
            told[name]["relative_norm"] = _number(change / length) if change is not None and length else None
        except NonFiniteError:
            pass  # a warning of inspect's own names the place
        except LoratoolsError as error:
            odd.append(f"{name}: what it changes has no norm: {error}")
        done += weight.spec.nbytes if weight is not None else 0
        if progress is not None:
            progress(done, total)
    return told, odd


def on_base(
    adapter: Mapping[str, Delta], base: Checkpoint, weights: Mapping[str, Ref], rows: Mapping[str, Row],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, dict[str, float | None]], list[str]]:  # fmt: skip
    """The same of an adapter on its base, of which no weight is read if it is quantised."""
    if base.quantization:
        return {name: dict(UNKNOWN) for name in adapter}, []
    return beside({name: supplied(name, delta, base) for name, delta in adapter.items()}, weights, rows, progress)


def change_norm(delta: Delta, weight: Ref | None, row: Row) -> float | None:
    """‖W′ − W‖, or ‖ΔW‖ of what is a difference; None where there is none that is a number."""
    if isinstance(delta, LowRank | Full) or (weight is None and row["norm"] is not None):
        return _number(row["norm"])
    return _number(norm_of(delta, weight))


def weight_norm(weight: Ref) -> float:
    """‖W‖, a block of rows at a time."""
    columns = weight.spec.matrix[1]
    return math.sqrt(math.fsum(square(block) for _, block in reader(weight, columns)(max(1, _ROWS // max(1, columns)))))


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
