"""Where the tensors lie that an adapter's names mean: a base tensor as it is, some rows of one, or a stack whose matrices are tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from loratools.deltas.base import Delta
from loratools.deltas.compose import Part, Stacked
from loratools.deltas.experts import Experts
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parts import joined
from loratools.errors import LoratoolsError, MatchError, UnsupportedError
from loratools.layouts.rules import Place
from loratools.refs import Ref, Spec
from loratools.sliced import Pool, Pooled, Sliced


@dataclass(frozen=True)
class Same:
    """The base's tensor of that name."""

    base: str


@dataclass(frozen=True)
class Within:
    """Rows [start, stop) of a base's tensor, its axes but the last taken as one."""

    base: str
    start: int
    stop: int


@dataclass(frozen=True)
class Fused:
    """A stack: the base's tensors, each the rows [start, stop) of an expert's matrix."""

    matrices: tuple[tuple[str, int, int, int], ...]  # base, expert, start, stop


Where: TypeAlias = Same | Within | Fused


_SEVERAL = "several of the base's tensors go by this name in memory"


@dataclass
class Collected:
    """Where tensors lie and what they are, by name; `faults` tell of names that two tensors have, or stacks of which some is lacking."""

    where: dict[str, Where] = field(default_factory=dict)
    specs: dict[str, Spec] = field(default_factory=dict)
    faults: dict[str, LoratoolsError] = field(default_factory=dict)

    def add(self, name: str, where: Where, spec: Spec) -> None:
        if name in self.where:
            self.specs.pop(name)
            self.faults[name] = MatchError(_SEVERAL, tensor=name, found=f"{shown(self.where.pop(name))}, {shown(where)}")
        elif name not in self.faults:
            self.where[name], self.specs[name] = where, spec


def collected(places: Mapping[str, Place], base: Mapping[str, Spec]) -> Collected:
    """The tensors that the base's become in memory."""
    result = Collected()
    stacks: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    parts: dict[str, int] = {}
    for name, place in places.items():
        if place.expert is None:
            result.add(place.name, Same(name), base[name])
        elif (place.expert, place.part) in stacks[place.name]:
            found = f"{stacks[place.name][place.expert, place.part]}, {name}"
            result.faults[place.name] = MatchError(_SEVERAL, tensor=place.name, found=found)
        else:
            stacks[place.name][place.expert, place.part], parts[place.name] = name, place.parts
    for stack, matrices in stacks.items():
        try:
            result.add(stack, *_stacked(matrices, parts[stack], base))
        except MatchError as error:
            result.faults[stack] = error.at(tensor=stack)
    return result


def _stacked(matrices: Mapping[tuple[int, int], str], parts: int, base: Mapping[str, Spec]) -> tuple[Fused, Spec]:
    """A stack and what it is. Raises MatchError where a matrix of it is lacking or of another size than its like."""
    experts = 1 + max(expert for expert, _ in matrices)
    places = [(expert, part) for expert in range(experts) for part in range(parts)]
    lacking = next((place for place in places if place not in matrices), None)
    if lacking is not None:
        like = next((f" like {name}" for (_, part), name in matrices.items() if part == lacking[1]), f", part {lacking[1]}")
        raise MatchError("the base lacks a matrix of this stack", found=f"none of expert {lacking[0]}{like}")
    first = [base[matrices[0, part]] for part in range(parts)]
    columns = first[0].matrix[1]
    starts = [sum(spec.matrix[0] for spec in first[:part]) for part in range(parts + 1)]
    for (_, part), name in matrices.items():
        expected = Spec(first[0].dtype, (first[part].matrix[0], columns))
        if base[name] != expected:
            raise MatchError("the base's matrices make no stack", found=f"{name} {base[name]}", expected=expected)
    listed = tuple((matrices[expert, part], expert, starts[part], starts[part + 1]) for expert, part in places)
    return Fused(listed), Spec(first[0].dtype, (experts, starts[-1], columns))


def shown(where: Where) -> str:
    """A base's tensor that is there."""
    return where.matrices[0][0] if isinstance(where, Fused) else where.base


def inside(place: Place, where: Where, spec: Spec) -> tuple[Where, Spec] | None:
    """A matrix of a stack, from where the stack lies: a tensor of its own, or rows; None where there is none such."""
    assert place.expert is not None
    if isinstance(where, Fused):
        every = sorted({start for _, _, start, _ in where.matrices})
        if len(every) != place.parts:
            return None
        wanted = (place.expert, every[place.part])
        found = [(name, stop - start) for name, expert, start, stop in where.matrices if (expert, start) == wanted]
        return (Same(found[0][0]), replace(spec, shape=(found[0][1], spec.shape[2]))) if found else None
    if not isinstance(where, Same) or len(spec.shape) != 3 or spec.shape[1] % place.parts or place.expert >= spec.shape[0]:
        return None
    height = spec.shape[1] // place.parts
    start = place.expert * spec.shape[1] + place.part * height
    return Within(where.base, start, start + height), replace(spec, shape=(height, spec.shape[2]))


def put(settled: Mapping[str, Delta], where: Mapping[str, Where]) -> tuple[dict[str, Delta], list[LoratoolsError]]:
    """Deltas by the base's names: stacks taken apart, matrices put together where they are rows of one; what cannot be is a fault."""
    placed: dict[str, Delta] = {}
    pool = Pool()
    rows: dict[str, list[Part]] = defaultdict(list)
    faults: list[LoratoolsError] = []
    for name, delta in settled.items():
        it = where.get(name, Same(name))
        if isinstance(it, Within):
            rows[it.base].append(Part(delta=delta, start=it.start, stop=it.stop))
            continue
        try:
            made = {it.base: delta} if isinstance(it, Same) else _apart(delta, it, pool)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
            continue
        faults += [_met(other) for other in made.keys() & placed.keys()]
        placed |= made
    faults += [_met(base) for base in rows.keys() & placed.keys()]
    return placed | {base: joined(parts) for base, parts in rows.items()}, faults


def _met(name: str) -> LoratoolsError:
    return UnsupportedError("two of the adapter's deltas lie on this tensor", tensor=name)


def _apart(delta: Delta, fused: Fused, pool: Pool) -> dict[str, Delta]:
    """A stack's delta as one of each of its matrices."""
    if isinstance(delta, Experts):
        pooled = replace(delta, B=Pooled(delta.B, pool))  # every expert has columns throughout all of B
        return {base: pooled.expert(expert, slice(start, stop)) for base, expert, start, stop in fused.matrices}
    if isinstance(delta, Stacked) and all(isinstance(member, LowRank | None) for member in delta.members):
        members = [(base, delta.members[expert], slice(start, stop)) for base, expert, start, stop in fused.matrices]
        return {base: replace(low, B=Sliced(low.B, rows)) for base, low, rows in members if isinstance(low, LowRank)}
    whole = delta.value if isinstance(delta, Replacement) else delta.diff if isinstance(delta, Full) else None
    if whole is None or len(whole.spec.shape) != 3:
        raise UnsupportedError(f"{delta.called} delta on a stack that the base stores matrix by matrix")
    flat, height = _flat(whole), whole.spec.shape[1]
    slices = {
        base: Sliced(flat, slice(expert * height + start, expert * height + stop)) for base, expert, start, stop in fused.matrices
    }
    if isinstance(delta, Full):
        return {base: replace(delta, diff=part) for base, part in slices.items()}
    assert isinstance(delta, Replacement)
    return {base: replace(delta, value=part) for base, part in slices.items()}


def _flat(ref: Ref) -> Ref:
    experts, height, columns = ref.spec.shape
    return ref.reshape(experts * height, columns)
