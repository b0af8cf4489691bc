"""A difference as a DoRA of the same W′, and a DoRA refitted along the other axis.

A difference is DoRA's direction as it is, with the magnitudes m = ‖W + ΔW‖ that divide themselves out. Along the other axis a W′ is
W + (W′ − W) divided by its own norms: exact for a direction that is dense or of full rank, else with the best W′ − W of its rank,
L, and the magnitudes that are nearest then: of t = W′ and v = W + L along a row or column, m = ⟨t, v⟩/‖v‖, one step of least squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loratools.deltas.base import Additive
from loratools.deltas.dora import DoRA
from loratools.deltas.flat import FlatDoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.magnitudes import AXES, norms
from loratools.effect import Effect, Made, square
from loratools.errors import NonFiniteError, NotExpressible, OptionError, UnsupportedError
from loratools.ops._case import Case, Converted, Job, check_form, factored, needs_base
from loratools.ops._convert_options import Options
from loratools.ops._drift import odd_axis
from loratools.tensors import read_tensor, to_ref

if TYPE_CHECKING:
    from torch import Tensor


def to_dora(case: Case, options: Options) -> Job | None:
    """The work that makes it a DoRA along the axis asked for, peft's by default; None where it stays as it is."""
    delta = case.delta
    if isinstance(delta, Replacement) or (isinstance(delta, Full) and case.vector):
        return None
    if isinstance(delta, DoRA | FlatDoRA):
        return to_axis(case, options)
    if not isinstance(delta, Additive) or case.vector:
        fact = f"{delta.called} change is no difference that could be a DoRA's direction"
        raise UnsupportedError(fact, remedy="convert --kind lora makes a direction of it")
    if case.weight is None or not case.oriented:
        raise needs_base(case, "the magnitudes of a DoRA are the norms of W + ΔW")
    check_form(case)
    axis = _axis(case, options.axis or "out")
    return partial(_with_magnitude, case, axis, options)


def to_axis(case: Case, options: Options) -> Job | None:
    """The work that refits a DoRA along the axis asked for; None where it has that axis, or is no DoRA."""
    delta = case.delta
    if not isinstance(delta, DoRA | FlatDoRA) or (options.axis is None and isinstance(delta, DoRA)):
        return None
    if case.weight is None or not case.oriented:
        raise needs_base(case, "what its magnitudes mean depends on W")
    axis = _axis(case, options.axis or "out")
    if isinstance(delta, DoRA):
        if delta.axis == axis:
            return None
        _check_rank(delta, options)
    return partial(_decided, case, axis if options.axis else None, options)


def _axis(case: Case, axis: str) -> str:
    """The axis of the weight as it is stored."""
    found = case.stored(axis)
    if found == "in" and len(case.shape()) > 2:
        raise NotExpressible("a magnitude for each input channel of a convolution", found="--magnitude-axis in", expected="out")
    return found


def _check_rank(delta: DoRA, options: Options) -> None:
    if not isinstance(delta.direction, Full) and "rank" not in delta.direction.facts() and options.rank is None and options.limit is None:
        fact = f"{delta.direction.called} direction, which the other axis changes, has no rank of its own"
        raise OptionError(fact, expected="--rank, --energy or --max-error")


# -- magnitudes for a difference


def _with_magnitude(case: Case, axis: str, options: Options) -> Converted:
    """The same difference with the norms of W + ΔW, rounded once to float32: all that W′ loses."""
    import torch

    assert isinstance(case.delta, Additive)
    effect = case.effect(options.device)
    exact = norms(effect.wide, effect.read(), case.delta, options.device).changed[axis].cpu()
    _check_lengths(exact, axis)
    m = exact.to(torch.float32)
    # a row of W + ΔW is its own unit vector times its norm, so what rounding the norms takes from W′ is what it takes from them
    error = float((m.to(torch.float64) - exact).norm())
    return Converted(delta=DoRA(direction=case.delta, magnitude=to_ref(_shaped(m, case, axis))), norm=case.delta.norm(), error=error)


def _check_lengths(norm: Tensor, axis: str) -> None:
    import torch

    if not bool(torch.isfinite(norm).all()):
        raise NonFiniteError("W + ΔW holds inf or nan", remedy="look at adapter and base with inspect --values")
    empty = (norm == 0).nonzero().flatten().tolist()
    if empty:
        found = f"{AXES[axis]} {', '.join(map(str, empty[:4]))}{', …' if len(empty) > 4 else ''}"
        raise UnsupportedError(f"a {AXES[axis]} of W + ΔW is zero, which a DoRA divides by its length", found=found)


def _shaped(m: Tensor, case: Case, axis: str) -> Tensor:
    return m.reshape(1, -1) if axis == "in" else m.reshape(-1, *(1,) * (len(case.shape()) - 1))


# -- another axis


def _decided(case: Case, axis: str | None, options: Options) -> Converted:
    found = case.decided(options.device)
    assert isinstance(found.delta, DoRA)
    if axis is None or found.delta.axis == axis:
        return Converted(delta=found.delta)  # a bare vector of magnitudes has its axis now
    _check_rank(found.delta, options)
    return _refitted(found, axis, options)


def _refitted(case: Case, axis: str, options: Options) -> Converted:
    """The same W′ along the other axis, or the nearest of the rank; the error is measured on W′ with all as stored."""
    import torch

    assert isinstance(case.delta, DoRA)
    direction, norm, plain = _direction(case, options)
    target, effect = case.effect(options.device), replace(case.effect(options.device), delta=direction)
    t_v, v_v = _products(target, effect, axis)
    _check_lengths(v_v, axis)
    m = _shaped((t_v / v_v.sqrt()).to(torch.float32).cpu(), case, axis)
    made = DoRA(direction=direction, magnitude=to_ref(m))
    pairs = zip(target.differences(), replace(effect, delta=made).differences(), strict=True)
    error = math.sqrt(math.fsum(square(new.sub_(old)) for old, new in pairs))
    optimal = None if plain else 0.0
    return Converted(delta=made, norm=norm, error=error, optimal=optimal, plain=plain, note=odd_axis(target))


def _direction(case: Case, options: Options) -> tuple[Additive, float, float | None]:
    """W′ − W as a direction of the kind that it had, ‖W′ − W‖, and the least error that factors alone would leave; None for none."""
    assert isinstance(case.delta, DoRA)
    old = case.delta.direction
    if isinstance(old, Full) and options.rank is None and options.limit is None:
        made = Made(case.effect(options.device), options.code or wide_code(case.weight.spec.dtype if case.weight else "F64"))
        stored = to_ref(read_tensor(made))
        return Full(diff=stored), made.norm or 0.0, None
    check_form(case)
    rank = options.rank or (None if options.limit is not None else int(old.facts()["rank"]))
    found = factored(case, options, rank=rank)
    full = found.delta.rank >= min(case.shape()[0], math.prod(case.shape()[1:]))
    return found.delta, found.norm, None if full else found.optimal


def wide_code(base: str) -> str:
    """What a difference of weights is stored in so that rounding it is not seen in them: float32 for 16 bits, else float64."""
    return "F64" if base in ("F32", "F64") else "F32"


def _products(target: Effect, effect: Effect, axis: str) -> tuple[Tensor, Tensor]:
    """⟨t, v⟩ and ⟨v, v⟩ along each row or column, t of W′ and v of W + L, in float64 and one order."""
    import torch

    from loratools.linalg.norms import ROWS, column_sums, row_sums

    read = target.read()
    bound, direct = (one.delta.bind(one.wide, read, one.device) for one in (target, effect))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for part, W in read(ROWS):
            v = direct(part, W.clone())
            yield bound(part, W) * v, v * v

    if axis == "out":
        sums = [(row_sums(t_v), row_sums(v_v)) for t_v, v_v in pairs()]
        return torch.cat([one for one, _ in sums]), torch.cat([other for _, other in sums])
    totals = [torch.zeros(target.spec.matrix[1], dtype=torch.float64, device=target.device) for _ in range(2)]
    for blocks in pairs():
        totals = [total + column_sums([block]) for total, block in zip(totals, blocks, strict=True)]
    return totals[0], totals[1]

