"""Adapters whose initialisation changed the base: the first factors taken off again, by themselves or by the base.

Training began at W_res + s·B₀·A₀ with W_res = W − s·B₀·A₀, so on the original base W′ = W + s·B·A − s·B₀·A₀. With the adapter as it
was initialised that is a LoRA of twice the rank, A′ = [A; A₀] and B′ = [B, −B₀], exactly (peft 0.21.2
`tuners/lora/model.py::subtract_mutated_init`); for PiSSA and OLoRA the base tells s·B₀·A₀ (`deltas.residual`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.laid import Unsettled
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import OnParameter
from loratools.deltas.residual import Residual
from loratools.errors import FormatError, LoratoolsError, MatchError, ShapeError, UnsupportedError, raise_all
from loratools.formats._derived import Joined
from loratools.formats._scale import exact_alpha
from loratools.refs import same_bytes

if TYPE_CHECKING:
    from loratools.refs import Ref

Pair = dict[str, Delta]


def low_in(delta: Delta) -> LowRank | None:
    """The LoRA of a weight's delta, None for what is none."""
    inner = delta.direction if isinstance(delta, DoRA) else delta
    return inner if isinstance(inner, LowRank) else None


def on_residuals(deltas: Mapping[str, Delta], init: str) -> dict[str, Delta]:
    """The deltas, each LoRA on what initialisation left of its weight, as the base will tell."""
    return _each(deltas, init, lambda name, delta, low: _residual(delta, low, init))


def _residual(delta: Delta, low: LowRank, init: str) -> Delta:
    assert isinstance(delta, LowRank | DoRA)
    turned = low.layer == "transposed"
    straight = delta.transposed() if turned else delta
    then = replace(straight, layer="linear") if isinstance(straight, LowRank) else straight
    if isinstance(then, DoRA) and isinstance(then.direction, LowRank):
        then = replace(then, direction=replace(then.direction, layer="linear"))
    return Unsettled(delta=Residual(init=init, then=then), transposed=True if turned else None)


def without_initial(deltas: Mapping[str, Delta], started: Mapping[str, Delta], init: str | None) -> dict[str, Delta]:
    """The deltas less what they began as. Raises, all together, where the two do not fit each other or the second is no beginning."""
    lows = {name: low for name, delta in deltas.items() if (low := low_in(delta))}
    first = {name: low for name, delta in started.items() if (low := low_in(delta))}
    raise_all(_unpaired(lows, first))
    if all(same_bytes(low.A, first[name].A) and same_bytes(low.B, first[name].B) for name, low in lows.items()):
        raise MatchError("--initial holds the same factors: nothing was trained, or it is the same adapter")
    return _each(deltas, init or "such an initialisation", lambda name, delta, low: _subtracted(delta, low, first[name]))


def _unpaired(lows: Mapping[str, LowRank], first: Mapping[str, LowRank]) -> list[LoratoolsError]:
    faults: list[LoratoolsError] = [MatchError("--initial has no LoRA on this weight", tensor=name) for name in lows if name not in first]
    faults += [MatchError("--initial has a LoRA on this weight, the adapter has none", tensor=name) for name in first if name not in lows]
    for name, low in lows.items():
        other = first.get(name)
        if other is not None and (low.A.spec.shape, low.B.spec.shape) != (other.A.spec.shape, other.B.spec.shape):
            found, expected = (f"A {list(one.A.spec.shape)}, B {list(one.B.spec.shape)}" for one in (other, low))
            faults.append(ShapeError("--initial has factors of another shape", tensor=name, found=found, expected=expected))
        elif other is not None and low.scaling != other.scaling:
            faults.append(FormatError("--initial has another scaling", tensor=name, found=other.scaling, expected=low.scaling))
    return faults


def _subtracted(delta: Delta, low: LowRank, first: LowRank) -> Delta:
    if _zero(first.A) or _zero(first.B):
        raise MatchError("--initial changes nothing here: it is a plain LoRA's beginning, and this adapter merges as it is")
    A = Joined((low.A, first.A), 0, negated=(False, False))
    B = Joined((low.B, first.B), 1, negated=(False, True))
    both = LowRank(A=A, B=B, alpha=exact_alpha(low.scaling, A.spec.shape[0]), layer=low.layer)
    return replace(delta, direction=both) if isinstance(delta, DoRA) else both


def _zero(ref: Ref) -> bool:
    from loratools.tensors import read_tensor

    return not bool(read_tensor(ref).any())


def _each(deltas: Mapping[str, Delta], init: str, make: Callable[[str, Delta, LowRank], Delta]) -> dict[str, Delta]:
    """The deltas, those of LoRA made anew; every fault is collected. Raises UnsupportedError for layers peft initialises otherwise."""
    made: dict[str, Delta] = {}
    faults: list[LoratoolsError] = []
    for name, delta in deltas.items():
        low = low_in(delta)
        try:
            other = low is not None and (low.layer in ("embedding", "conv") or not name.endswith(".weight"))
            if other or isinstance(delta, OnParameter):
                raise UnsupportedError(f"peft has no {init} for this kind of layer")
            made[name] = make(name, delta, low) if low is not None else delta
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    return made
