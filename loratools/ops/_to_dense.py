"""Any change of a weight as the dense difference W′ − W, computed while it is written and never whole in memory."""

from __future__ import annotations

from functools import partial

from loratools.deltas.full import Full, Replacement
from loratools.effect import Made
from loratools.ops._case import Case, Converted, Job, needs_base
from loratools.ops._convert_options import Options
from loratools.ops._drift import odd_axis
from loratools.ops._to_dora import wide_code


def to_dense(case: Case, options: Options) -> Job | None:
    """The work that makes it a dense difference; None where it is one, or a tensor saved whole."""
    if isinstance(case.delta, Full | Replacement):
        return None
    if case.weight is None or not (case.oriented or case.vector or case.reason):
        raise needs_base(case, "a dense difference has the shape, and the orientation, of the weight")
    return partial(_dense, case, options)


def _dense(case: Case, options: Options) -> Converted:
    case = case.decided(options.device)
    assert case.weight is not None
    effect = case.effect(options.device)
    made = Made(effect, options.code or wide_code(case.weight.spec.dtype), case.name)
    return Converted(delta=Full(diff=made), made=made, note=odd_axis(effect))
