"""LoRA on bare parameters, such as fused experts, as a file leaves it open: which parameter, how many experts, which axis A reads.

peft 0.21.2 (`tuners/lora/layer.py::ParamWrapper`) wraps a module once for each of its parameters that `target_parameters` names, in the
order in which the module registered them, so that the first lies innermost. Its keys name the module alone. What tells are the
sizes of the base's parameters; which of two equal sizes is `in` depends on peft's version and the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from loratools.deltas.axes import required, turned_by
from loratools.deltas.base import Bound, Delta, Read
from loratools.deltas.experts import PACKINGS, Experts
from loratools.deltas.lowrank import LowRank
from loratools.deltas.registered import as_registered, in_registered_order
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, ShapeError
from loratools.refs import Ref, Spec


@dataclass(frozen=True)
class Choice:
    """A tensor that a wrapper may be about, and what the config's patterns say of it; `plain` is a layer's weight, no bare parameter."""

    name: str
    alpha: float
    rank: int | None
    plain: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class OnParameter(Delta):
    """A (experts·rank, in) and B (out, rank·experts) of one wrapper; `depth` counts the wrappers of its module from the outermost, 0."""

    kind = "parameter"

    A: Ref
    B: Ref
    module: str
    depth: int
    choices: tuple[Choice, ...]
    rslora: bool = False
    packing: str = PACKINGS[0]
    version: str | None = None

    def spec(self, base: Spec | None) -> Spec:
        raise AssertionError("resolve the adapter first")

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        raise AssertionError("resolve the adapter first")

    def facts(self) -> dict[str, Any]:
        alphas, ranks = {choice.alpha for choice in self.choices}, {choice.rank for choice in self.choices}
        return {"rank": ranks.pop() if len(ranks) == 1 else None, "alpha": alphas.pop() if len(alphas) == 1 else None}

    def ways(self, choice: Choice, base: Spec) -> tuple[bool, ...]:
        """Which of B·A (False) and its transpose (True) fit the parameter; a square takes both. Raises ShapeError for neither."""
        a, b = self.A.spec.shape, self.B.spec.shape
        if len(base.shape) not in (2, 3):
            raise ShapeError("LoRA on a parameter is for matrices and stacks of them", found=list(base.shape))
        found, experts = f"A {list(a)}, B {list(b)}", base.shape[0] if len(base.shape) == 3 else 1
        if a[0] % experts:
            raise ShapeError("A has not as many rows for each expert", found=found, expected=f"A [{experts}·rank, in]")
        rows, columns = base.shape[-2:]
        sizes = {False: (columns, rows), True: (rows, columns)} if experts > 1 else {False: (columns, rows)}
        fitting = tuple(turned for turned, size in sizes.items() if size == (a[1], b[0]))
        if not fitting:
            raise ShapeError("A and B do not fit the parameter", found=found, expected=f"factors of {list(base.shape)}")
        if choice.rank is not None and a[0] // experts != choice.rank:
            raise ShapeError(f"the rank of each of {experts} experts is not the config's", found=a[0] // experts, expected=choice.rank)
        return fitting

    def settled(self, choice: Choice, base: Spec, turned: bool) -> Delta:
        """The change of the parameter that it turned out to be about."""
        if choice.plain or len(base.shape) == 2:
            layer = "unknown" if choice.plain else "linear"
            return LowRank(A=self.A, B=self.B, alpha=choice.alpha, rslora=self.rslora, layer=layer)
        return Experts(
            A=self.A, B=self.B, alpha=choice.alpha, rslora=self.rslora, experts=base.shape[0], turned=turned, packing=self.packing
        )


def moved(delta: Delta, name: str, place: str) -> Delta:
    """A delta that goes by another name now: all that a wrapper may be about moves with its module."""
    if not isinstance(delta, OnParameter) or name == place:
        return delta
    old, new = name.rpartition(".")[0], place.rpartition(".")[0]
    spelt = {name: place}
    choices = [replace(choice, name=spelt.get(choice.name, new + choice.name.removeprefix(old))) for choice in delta.choices]
    return replace(delta, choices=tuple(choices))


def names_of(name: str, delta: Delta) -> tuple[str, ...]:
    """The tensors that a delta may be about: of a wrapper, all its choices."""
    return tuple(choice.name for choice in delta.choices) if isinstance(delta, OnParameter) else (name,)


@dataclass
class _Found:
    """A wrapper with its parameter, and the ways round that its sizes allow."""

    delta: OnParameter
    choice: Choice
    base: Spec
    ways: tuple[bool, ...]


def settle_parameters(
    deltas: Mapping[str, Delta], base: Mapping[str, Spec], types: Iterable[str], *, either: Callable[[str], bool] = lambda name: False
) -> tuple[dict[str, Delta], list[LoratoolsError]]:
    """The deltas with every parameter found that the base has any candidate for, or a fault; the others stay as they are.

    `types` are the model's types, `either` says of a name whether files store its matrices both ways round.
    """
    kinds = set(types)
    groups: dict[str, dict[str, OnParameter]] = defaultdict(dict)
    for name, delta in deltas.items():
        if isinstance(delta, OnParameter) and any(choice.name in base for choice in delta.choices):
            groups[delta.module][name] = delta
    found: dict[str, _Found] = {}
    faults: list[LoratoolsError] = []
    for group in groups.values():
        innermost = sorted(group, key=lambda name: -group[name].depth)
        try:
            found |= dict(zip(innermost, _assigned([group[name] for name in innermost], base, kinds), strict=True))
        except LoratoolsError as error:
            faults.append(error.at(tensor=innermost[0]))
    known = _known_ways(found.values())
    settled: dict[str, Delta] = {}
    for name, delta in deltas.items():
        if name not in found:
            settled |= {} if isinstance(delta, OnParameter) and name in groups.get(delta.module, {}) else {name: delta}
            continue
        item = found[name]
        turned = _turned(item, known, kinds, either)
        if turned is None:
            faults.append(_square(item))
        elif _stacked(item) and not either(item.choice.name) and required(item.delta.version, kinds) not in (None, turned):
            faults.append(_other_way(item))
        settled[item.choice.name] = item.delta.settled(item.choice, item.base, bool(turned))
    return settled, faults


def _assigned(wrappers: list[OnParameter], base: Mapping[str, Spec], types: set[str]) -> list[_Found]:
    """Each wrapper of a module, the innermost first, with its parameter."""
    plain = next((choice for choice in wrappers[0].choices if choice.plain and choice.name in base), None)
    if plain is not None:
        return [_Found(wrappers[0], plain, base[plain.name], (False,))]
    names = [choice.name for choice in wrappers[0].choices if choice.name in base]
    if len(names) < len(wrappers):
        fact, remedy = f"{len(wrappers)} adapters on parameters of one module", "was it trained on another model?"
        raise MatchError(fact, found=f"{', '.join(names)} in the base", remedy=remedy)
    chosen = [[_at(wrapper, name) for wrapper, name in zip(wrappers, order, strict=True)] for order in permutations(names, len(wrappers))]
    fitting = [found for order in chosen if (found := _fitted(wrappers, order, base)) is not None]
    # of a matrix and one of the transposed sizes each takes the other's factors turned; peft's version tells them apart
    usual_way = turned_by(wrappers[0].version, types)
    fitting = [found for found in fitting if all(usual_way in item.ways for item in found)] or fitting
    in_order = [found for found in fitting if as_registered([item.choice.name for item in found])]
    if len(in_order) == 1:
        return in_order[0]
    if in_order:
        raise AmbiguousError(
            "its sizes fit several parameters of the module", found=", ".join(names),
            remedy="save an adapter for each parameter, with that one in target_parameters",
        )  # fmt: skip
    if fitting:
        inner = in_registered_order(item.choice.name for item in fitting[0])[0]
        fact = "the adapters of one module are nested the other way round"
        raise ShapeError(fact, found=f"{fitting[0][0].choice.name} innermost", expected=f"{inner}, which the model registers first")
    usual = in_registered_order(names)[: len(wrappers)]
    for wrapper, name in zip(wrappers, usual, strict=True):
        try:
            wrapper.ways(_at(wrapper, name), base[name])
        except ShapeError as error:
            raise error.at(tensor=name) from None
    raise AssertionError("the usual order does not fit, and each of it does")


def _at(wrapper: OnParameter, name: str) -> Choice:
    return next(choice for choice in wrapper.choices if choice.name == name)


def _fitted(wrappers: list[OnParameter], choices: list[Choice], base: Mapping[str, Spec]) -> list[_Found] | None:
    try:
        pairs = zip(wrappers, choices, strict=True)
        return [_Found(wrapper, choice, base[choice.name], wrapper.ways(choice, base[choice.name])) for wrapper, choice in pairs]
    except ShapeError:
        return None


def _known_ways(found: Iterable[_Found]) -> dict[str, set[bool]]:
    """By kind of module, which way round its stacks lie that are no squares: one class stores all of its stacks alike."""
    known: dict[str, set[bool]] = defaultdict(set)
    for item in found:
        if _stacked(item) and len(item.ways) == 1:
            known[_kind(item)].add(item.ways[0])
    return known


def _stacked(item: _Found) -> bool:
    return len(item.base.shape) == 3 and item.base.shape[0] > 1 and not item.choice.plain


def _kind(item: _Found) -> str:
    return re.sub(r"\d+", "#", item.delta.module)


def _turned(item: _Found, known: Mapping[str, set[bool]], types: set[str], either: Callable[[str], bool]) -> bool | None:
    """Whether the transpose of B·A is added; None where nothing tells."""
    if len(item.ways) == 1:
        return item.ways[0]
    seen = known.get(_kind(item), set())
    if seen:
        return seen.copy().pop() if len(seen) == 1 else None
    return None if either(item.choice.name) else turned_by(item.delta.version, types)


def _other_way(item: _Found) -> ShapeError:
    a, b = item.delta.A.spec.shape, item.delta.B.spec.shape
    return ShapeError(
        f"peft {item.delta.version} has A read the other axis of this parameter", tensor=item.choice.name,
        found=f"A {list(a)}, B {list(b)} on {list(item.base.shape)}",
        remedy="if another version wrote it, remove peft_version from adapter_config.json to go by the sizes",
    )  # fmt: skip


def _square(item: _Found) -> AmbiguousError:
    version = item.delta.version
    return AmbiguousError(
        "a stack of squares, and nothing tells which of its axes A reads", tensor=item.choice.name,
        found=f"{list(item.base.shape)}, {f'peft_version {version}' if version else 'no peft_version'}",
        remedy="add the peft_version that wrote it to adapter_config.json, and the base's config.json",
    )  # fmt: skip
