"""Any change of a weight as plain LoRA: kept where it is one, exact where it is a product of small rank, else the best of a rank."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from loratools.compress import Style, known_of, lossless_rank, rounded, truncated
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Part, Stacked
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import TurnedAdditive
from loratools.deltas.lowrank import LowRank
from loratools.deltas.magnitudes import norms
from loratools.errors import OptionError
from loratools.ops._case import Case, Converted, Job, check_form, check_rank, factored, needs_base
from loratools.ops._convert_options import Options
from loratools.ops._drift import other_axis
from loratools.ops._resizing import kept, reached, resized
from loratools.tensors import read_tensor, to_ref


def to_lora(case: Case, options: Options) -> Job | None:
    """The work that makes it a LoRA, None where it stays as it is: LoRA itself, tensors saved whole, differences of biases."""
    delta = case.delta
    if isinstance(delta, LowRank):
        asked = options.rank is not None and options.rank < delta.rank
        return partial(_kept, delta, options) if asked or options.limit is not None or options.code else None
    if isinstance(delta, Replacement) or _is_low(delta) or (isinstance(delta, Full) and case.vector):
        return None
    if case.weight is None and (not isinstance(delta, Additive) or _unsized(delta)):
        raise needs_base(case, _WHY.get(delta.kind, "what it does to a weight depends on that weight"))
    if case.vector:
        return partial(_vector, case, options)
    check_form(case)
    if isinstance(delta, Additive) and has_product(delta):
        return partial(_product, case, options)
    check_rank(case, options)
    return partial(_dense, case, options)


_WHY = {"dora": "W' - W is more than its factors, its magnitudes scale W itself; without W they would be lost"}


def _unsized(delta: Additive) -> bool:
    """Whether its kind is of a matrix whose sizes only the base tells."""
    return len(delta.shape()) < 2 and not isinstance(delta, Full)


def _is_low(delta: Delta) -> bool:
    """Whether it is LoRA on part of a tensor, or on members of a stack."""
    if isinstance(delta, Part):
        return isinstance(delta.delta, LowRank) or _is_low(delta.delta)
    return isinstance(delta, Stacked) and all(member is None or isinstance(member, LowRank) or _is_low(member) for member in delta.members)


def has_product(delta: Additive) -> bool:
    """Whether its kind knows a product at all; whether this one does, its data tells."""
    inner = delta.delta if isinstance(delta, TurnedAdditive) else delta
    return type(inner).product is not Additive.product


def _kept(low: LowRank, options: Options) -> Converted:
    if options.limit is not None:
        return Converted.of(reached(low, options.limit, options.code))
    rank = min(options.rank or low.rank, low.rank)
    return Converted.of(resized(low, rank, options.code) if rank < low.rank else kept(low, rank, options.code))


def _vector(case: Case, options: Options) -> Converted:
    """A difference of a bias: W′ − W itself."""
    import torch

    change = case.effect(options.device).change()
    code = options.code or "F32"
    stored = change.D.reshape(case.shape()).to(torch.float64).cpu()
    ref = rounded(stored, code)
    error = float((read_tensor(ref, torch.float64) - stored).norm())
    return Converted(delta=Full(diff=ref), norm=change.norm, error=error)


def _product(case: Case, options: Options) -> Converted:
    """The SVD of a small product through its core: no m × n matrix, and nothing lost at the rank that ΔW has."""
    assert isinstance(case.delta, Additive)
    found = case.delta.product(options.device)
    if found is None:
        if options.rank is None and options.limit is None:
            fact = f"{case.delta.called} delta has no small product, so it is approximated"
            raise OptionError(fact, expected="--rank, --energy or --max-error")
        return _dense(case, options)
    B, A = (to_ref(part) for part in found)
    shape = case.shape()
    low = LowRank(B=B, A=A.reshape(A.spec.shape[0], *shape[1:]), alpha=float(A.spec.shape[0]), layer=case.layer)
    code = options.code or _code(case.delta)
    if options.limit is not None:
        return Converted.of(reached(low, options.limit, code))
    known, noise = known_of([(low, 1.0)])
    needed = lossless_rank(known, noise, code)
    style = Style(code=code, shape=shape, layer=case.layer)
    return Converted.of(truncated(known, min(options.rank or needed, needed), style))


def _code(delta: Delta) -> str:
    """float32, unless a tensor of the delta is float64."""
    return "F64" if any(ref.spec.dtype == "F64" for ref in delta.refs().values()) else "F32"


def _dense(case: Case, options: Options) -> Converted:
    """W′ − W truncated, with its error beside a lower bound of the best; of a DoRA, with the part that only scales W's rows."""
    import torch

    case = case.decided(options.device)
    made = Converted.of(factored(case, options))
    if not isinstance(case.delta, DoRA):
        return made
    effect = case.effect(options.device)
    found = norms(effect.wide, effect.read(), case.delta.direction, options.device)
    m, axis = read_tensor(case.delta.magnitude, torch.float64, options.device).reshape(-1), case.delta.axis
    if axis not in found.changed:  # channels of a convolution's input, of which no norms are taken
        return made
    # (g − 1)∘W from the norms alone: g is one number for each row, or column
    scaling = float(((m / found.changed[axis] - 1) * found.base[axis]).norm())
    return replace(made, scaling=scaling, note=other_axis(axis, m, found))

