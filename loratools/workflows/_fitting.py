"""What `fit` makes of an adapter: some of it apart, some made LoRA, one rank and one scaling for all of it where a target has one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.compress import alpha_for, error_of, known_of, padded, rounded
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.deltas.residual import INITS
from loratools.errors import LoratoolsError, NonFiniteError, raise_all
from loratools.ops._algebra import bias_of, low_of, rank_of, scaled_to, shares, with_low
from loratools.ops._base import Base
from loratools.ops._convert_options import Options
from loratools.ops._converting import Conversion
from loratools.ops._resizing import resized
from loratools.ops._to_lora import has_product
from loratools.refs import Ref
from loratools.tensors import read_tensor
from loratools.workflows._weights import sized
from loratools.workflows.targets import Target

_NARROW = ("F16", "BF16")  # dtypes in which multiplying a factor by anything but a power of two costs something one sees
_TURNED = ("transposed", "embedding")
_FOLLOWING = ("peft", "diffusers")  # formats in which a bias's difference is under the scaling of its module


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A delta as the target takes it, ‖ΔW‖ before, ‖ΔW − ΔW′‖ as stored and the least that its rank allows (None: not known)."""

    delta: Delta
    norm: float
    error: float
    optimal: float | None
    exact: bool = True

    def row(self, name: str, before: Delta, share: float | None) -> dict[str, Any]:
        error, best = (None if value is None else value / self.norm if self.norm else 0.0 for value in (self.error, self.optimal))
        facts, were = self.delta.facts(), before.facts()
        row: dict[str, Any] = {"name": name, "kind": self.delta.kind, "kind_before": before.kind}
        row |= {"rank": facts.get("rank"), "rank_before": were.get("rank"), "error": error, "optimal_error": best, "share": share}
        scalings = {"scaling_before": were.get("scaling"), "scaling": facts.get("scaling")}
        return row | {word: value for word, value in scalings.items() if value is not None}


def split(adapter: Adapter, names: Iterable[str]) -> tuple[Adapter, Adapter]:
    """(what stays, what goes apart): of a saved tensor with LoRA after it the tensor goes and the LoRA stays."""
    going = set(names)
    stay: dict[str, Delta] = {}
    apart: dict[str, Delta] = {}
    for name, delta in adapter.items():
        if name not in going:
            stay[name] = delta
        elif isinstance(delta, Chain) and isinstance(delta.first, Replacement):
            apart[name], stay[name] = delta.first, delta.then
        else:
            apart[name] = delta.delta if isinstance(delta, WherePresent) else delta
    riding = {name: ref for name, ref in adapter.passengers.items() if name in going}
    rest = {name: ref for name, ref in adapter.passengers.items() if name not in going}
    return replace(adapter, deltas=stay, passengers=rest, expects=None), replace(adapter, deltas=apart, passengers=riding, expects=None)


def made_lora(adapter: Adapter, names: Iterable[str], base: Base | None, asked: int | None, limit: int | None) -> dict[str, Fitted]:
    """These deltas as LoRA: exact where they are products of small rank, else the best of a rank, with their errors.

    No rank is above `limit`. Without an `asked` one what is of no small rank gets the greatest that the adapter has, twice its own if
    it is relative to a residual.
    """
    chosen = {name: adapter[name] for name in names}
    groups: dict[int | None, dict[str, Delta]] = {}
    for name, delta in chosen.items():
        groups.setdefault(_rank_for(delta, adapter, asked, limit), {})[name] = delta
    found: dict[str, Fitted] = {}
    faults: list[LoratoolsError] = []
    for rank, deltas in groups.items():
        options = Options(kind="lora", axis=None, rank=rank, limit=None, code=None, device="cpu", threads=workers.default_threads())
        work = Conversion(replace(adapter, deltas=deltas, expects=None), base, options)
        try:
            work.run()
        except LoratoolsError as error:
            faults.append(error)
            continue
        for one in work.converted.values():
            one.measure()
        found |= {
            name: Fitted(delta=work.deltas[name], norm=one.norm, error=one.error, optimal=one.optimal, exact=False)
            for name, one in work.converted.items()
        }
    raise_all(faults)
    return found


def _rank_for(delta: Delta, adapter: Adapter, asked: int | None, limit: int | None) -> int | None:
    inner = delta.then if isinstance(delta, Chain) else delta
    inner = inner.delta if isinstance(inner, Unsettled) else inner
    if isinstance(inner, Additive) and has_product(inner) and (not sized(inner) or inner.product() is not None):
        return limit
    own = rank_of(inner) or inner.facts().get("rank")
    ranks = [rank for other in adapter.values() if (rank := rank_of(other))]
    wanted = 2 * int(own) if inner.kind in INITS and own else max([*ranks, int(own or 0)], default=0) or 8
    return min(asked or wanted, limit or wanted)


def levelled(deltas: Mapping[str, Fitted], target: Target, *, max_rank: int | None, touch: bool) -> dict[str, Fitted]:
    """The LoRA among the deltas at ranks within `max_rank`, and where the target has one, at one rank and one scaling.

    Nothing that is so already changes a byte; without `touch` a scaling stays that nothing else moved.
    """
    lows = {name: low for name, one in deltas.items() if (low := _low(one.delta)) is not None}
    cut = {name: resized(low, max_rank, None) for name, low in lows.items() if max_rank is not None and low.rank > max_rank}
    made = {name: found.delta for name, found in cut.items()}
    made = {name: made.get(name, low) for name, low in lows.items()}
    common = max((low.rank for low in made.values()), default=0)
    uneven = target.uniform_rank and any(low.rank != common for low in made.values())
    if target.uniform_rank:
        made = {name: padded(low, common) for name, low in made.items()}
    if target.one_scale and (touch or cut or uneven or any(not one.exact for one in deltas.values())):
        scaling = one_scaling(made.values())
        made = {name: baked(low, scaling) for name, low in made.items()}
    fitted = dict(deltas)
    for name, low in made.items():
        if low is lows[name]:
            continue
        before = deltas[name]
        own = _lost(lows[name], low)
        best = cut[name].optimal if name in cut else 0.0
        optimal = None if before.optimal is None else max(before.optimal, best)
        fitted[name] = replace(before, delta=with_low(before.delta, low), error=max(before.error + own, best), optimal=optimal)
    return _with_biases(deltas, fitted, follow=target.format in _FOLLOWING)


def _low(delta: Delta) -> LowRank | None:
    try:
        return low_of(delta)
    except LoratoolsError:
        return None


def one_scaling(lows: Iterable[LowRank]) -> float:
    """The scaling that all shall have: 1 where that costs nothing one sees, else the one that leaves most factors' bits alone.

    >>> one_scaling([])
    1.0
    """
    known = list(lows)
    scalings = Counter(low.scaling for low in known if low.scaling)
    narrow = any(low.B.spec.dtype in _NARROW for low in known)
    if not narrow or all(_power(scaling) for scaling in scalings):
        return 1.0
    exact = {one: sum(count for other, count in scalings.items() if _power(other / one)) for one in (1.0, *scalings)}
    return max(exact, key=lambda one: (exact[one], scalings[one]))


def _power(value: float) -> bool:
    """Whether it is a power of two, by which a factor is multiplied without rounding."""
    return abs(math.frexp(value)[0]) == 0.5


def baked(low: LowRank, scaling: float) -> LowRank:
    """The same ΔW under another scaling and without rsLoRA: B takes the factor, in float32 where its own dtype has no room for it."""
    import torch

    alpha = alpha_for(scaling, low.rank)
    if low.layer in _TURNED and low.scaling != scaling:
        return replace(baked(_straight(low), scaling).transposed(), layer=low.layer)
    if low.scaling == scaling:
        return low if not low.rslora else replace(low, alpha=alpha, rslora=False)
    wide = read_tensor(low.B, torch.float64) * (low.scaling / scaling)
    return replace(low, B=_stored(wide, low.B.spec.dtype), alpha=alpha, rslora=False)


def _straight(low: LowRank) -> LowRank:
    """The factors as a file has them, which of weights that lie the other way are exchanged: its B, not its A, takes a factor."""
    return replace(low.transposed(), layer="unknown") if low.layer in _TURNED else low


def _stored(wide: Any, code: str) -> Ref:
    try:
        return rounded(wide, code)
    except NonFiniteError:
        if code not in _NARROW:
            raise
        return rounded(wide, "F32")


def _lost(before: LowRank, after: LowRank) -> float:
    """‖ΔW − ΔW′‖, 0 where the factors tell that they are the same product."""
    import torch

    before, after = _straight(before), _straight(after)
    if after.rank >= before.rank:
        B, A = before.factors()
        made, other = after.factors()
        same = torch.equal(other[: before.rank], A) and torch.equal(made[:, : before.rank] * after.scaling, B * before.scaling)
        if same or (torch.equal(other[: before.rank], A) and _scaled(before, after, made[:, : before.rank], B)):
            return 0.0
    return error_of(known_of([(before, 1.0)])[0], after)


def _scaled(before: LowRank, after: LowRank, made: Any, B: Any) -> bool:
    """Whether B was multiplied by a power of two, or not at all, and alpha makes up for it."""
    import torch

    factor = before.scaling / after.scaling if after.scaling else 0.0
    near = 2.0 ** round(math.log2(factor)) if factor > 0 else 0.0
    return near > 0 and abs(factor / near - 1) < 2.0**-50 and torch.equal(made, B * near)


def _with_biases(before: Mapping[str, Fitted], after: dict[str, Fitted], *, follow: bool) -> dict[str, Fitted]:
    """A bias difference worth what it was, under the scaling that its module has now if it is to `follow`, else under none."""
    deltas = {name: one.delta for name, one in after.items()}
    for name, one in before.items():
        low = bias_of(name, deltas) if isinstance(one.delta, Full) else None
        if isinstance(one.delta, Full) and low is not None:
            made, lost = scaled_to(one.delta, low.scaling if follow else 1.0)
            after[name] = replace(one, delta=made, error=lost * one.norm)
    return after


def rows_of(before: Mapping[str, Delta], fitted: Mapping[str, Fitted]) -> list[dict[str, Any]]:
    """A receipt's row for each delta that is LoRA now, or was changed."""
    share = shares([one.norm for one in fitted.values()])
    return [one.row(name, before.get(name, one.delta), part) for (name, one), part in zip(fitted.items(), share, strict=True)]


def size_of(delta: Delta) -> float:
    """‖ΔW‖ of a difference, of a DoRA its direction's; 0 for a tensor saved whole, of which nothing can be lost."""
    inner = delta.delta if isinstance(delta, Unsettled | WherePresent) else delta
    if sized(inner):
        return inner.norm()
    low = _low(inner)
    return 0.0 if low is None else low.norm()
