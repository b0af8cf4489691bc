"""One delta on its way to another kind: the weight it meets, the layer that is of, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from blake3 import blake3

from loratools.changes import reader
from loratools.deltas.base import Additive, Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.flat import FlatDoRA
from loratools.deltas.laid import Turned, TurnedAdditive, Unsettled, turned
from loratools.deltas.lowrank import LowRank
from loratools.effect import Effect, Made
from loratools.errors import LoratoolsError, NotExpressible, OptionError, UnsupportedError
from loratools.factors import Factored, How, factor, form_of, reach
from loratools.families import Family
from loratools.ops._convert_options import Options
from loratools.refs import Ref, Spec

Job: TypeAlias = "Callable[[], Converted]"
TOO_FAR = "no rank stays within --max-error or --energy"


@dataclass
class Converted:
    """What became of a delta: ‖W′ − W‖, the error as stored and a lower bound of the best there is, where they are known.

    `scaling` is ‖(g − 1)∘W‖ of a DoRA, g = m/‖W + ΔW‖; `plain` the least error of plain factors where the delta is no plain ones;
    `made` measures itself when it is written.
    """

    delta: Delta
    norm: float = 0.0
    error: float = 0.0
    optimal: float | None = 0.0
    scaling: float | None = None
    plain: float | None = None
    made: Made | None = None
    note: str | None = None

    @classmethod
    def of(cls, found: Factored) -> Converted:
        return cls(delta=found.delta, norm=found.norm, error=found.error, optimal=found.optimal)

    def row(self, name: str, before: Delta, share: float | None) -> dict[str, Any]:
        """The receipt's row: errors are relative to ‖W′ − W‖."""

        def part(value: float | None) -> float | None:
            return None if value is None else value / self.norm if self.norm else None if value else 0.0

        error = part(self.error)
        row: dict[str, Any] = {"name": name, "kind": self.delta.kind, "kind_before": before.kind, "rank": self.delta.facts().get("rank")}
        row |= {"rank_before": before.facts().get("rank"), "error": error, "optimal_error": part(self.optimal), "share": share}
        row["energy"] = None if error is None else max(0.0, 1 - error**2)
        row |= {"row_scaling": part(self.scaling)} if self.scaling is not None else {}
        return row | ({"plain_error": part(self.plain)} if self.plain is not None else {})

    def measure(self) -> None:
        """Take over what a tensor measured while it was written."""
        if self.made is not None:
            self.norm, self.error = self.made.norm or 0.0, self.made.error or 0.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A delta under its name; `spec` and `weight` are of the tensor it changes, `layer` is "" with a `reason` where LoRA has none."""

    name: str
    delta: Delta
    spec: Spec | None
    weight: Ref | None
    layer: str = "unknown"
    reason: str = ""

    @property
    def oriented(self) -> bool:
        """Whether it is known how the weight lies, so that a tensor of its shape can be written, or its rows told from its columns."""
        return self.spec is not None and self.layer != "unknown"

    @property
    def vector(self) -> bool:
        """Whether it changes no matrix: a bias, a norm's weight."""
        if self.spec is not None:
            return len(self.spec.shape) < 2
        return isinstance(self.delta, Additive) and len(self.delta.shape()) < 2

    def shape(self) -> tuple[int, ...]:
        """The weight's, or what a difference of unknown layer says itself."""
        if self.spec is not None:
            return self.spec.shape
        assert isinstance(self.delta, Additive)
        return self.delta.unfolded()

    def stored(self, axis: str) -> str:
        """A layer's `out` or `in` as the axis of the weight as it is stored: `out` for its rows."""
        turned_about = self.layer in ("embedding", "transposed")
        return {"out": "in", "in": "out"}[axis] if turned_about else axis

    def effect(self, device: str) -> Effect:
        return Effect(delta=self.delta, spec=self.spec or Spec("F64", self.shape()), weight=self.weight, device=device)

    def decided(self, device: str) -> Case:
        """The same case with the axis of a bare vector of magnitudes found out."""
        if not isinstance(self.delta, FlatDoRA):
            return self
        assert self.weight is not None
        spec = Spec("F64", self.shape())
        return replace(self, delta=self.delta.decided(spec, reader(self.weight, self.delta.matrix(spec)[1], device), device))


def case_of(name: str, delta: Delta, weight: Ref | None, family: Family) -> Case:
    """A delta with what is known of its weight; one that a file left open is taken as its file has it where no base tells more."""
    if isinstance(delta, Unsettled):
        layer = {True: "transposed", False: "linear", None: "unknown"}[delta.transposed]
        return Case(name=name, delta=turned(delta.delta) if delta.transposed else delta.delta, spec=None, weight=None, layer=layer)
    spec = weight.spec if weight is not None else None
    layer, reason = _layer(name, delta, spec, family)
    return Case(name=name, delta=delta, spec=spec, weight=weight, layer=layer, reason=reason)


def _layer(name: str, delta: Delta, spec: Spec | None, family: Family) -> tuple[str, str]:
    inner = delta.direction if isinstance(delta, DoRA | FlatDoRA) else delta
    if isinstance(inner, LowRank):
        return inner.layer, ""
    turned_about = isinstance(inner, Turned | TurnedAdditive)
    if spec is None:
        return ("transposed" if turned_about else "unknown"), ""
    layer, reason = form_of(name, spec, family)
    return ("transposed" if turned_about and layer == "linear" else layer or ""), reason


def needs_base(case: Case, why: str) -> LoratoolsError:
    """The error of a conversion that cannot be done without W."""
    return UnsupportedError(f"{case.delta.called} delta: {why}", remedy="give --base")


def check_rank(case: Case, options: Options) -> None:
    if options.rank is None and options.limit is None:
        fact = f"{case.delta.called} delta is of no small rank, so it is approximated, and how nearly is open"
        raise OptionError(fact, expected="--rank, --energy or --max-error")


def check_form(case: Case) -> None:
    if not case.layer:
        raise NotExpressible(f"{case.delta.called} delta has no low-rank form: {case.reason}", remedy="convert --kind dense keeps it")


def factored(case: Case, options: Options, *, rank: int | None = None) -> Factored:
    """W′ − W truncated by its SVD, to `rank` or by the options. Raises OptionError where no rank is near enough."""
    change = case.effect(options.device).change()
    how = How(code=options.code or "F32", seed=_seed(case.name))
    about: dict[str, Any] = {"shape": case.shape(), "layer": case.layer, "rounding": change.rounding}
    rank = rank or options.rank
    if rank is not None:
        return factor(change.D, min(rank, *change.D.shape), how, **about)
    assert options.limit is not None
    found = reach(change.D, options.limit, how, **about) if change.norm else factor(change.D, 1, how, **about)
    if found is None:
        raise OptionError(TOO_FAR, found=f"{how.code} factors", remedy="give a wider --dtype, or --rank")
    return found


def _seed(name: str) -> int:
    """A seed of the tensor's own, so that the order of the work does not matter."""
    return int.from_bytes(blake3(name.encode()).digest(7), "little")
