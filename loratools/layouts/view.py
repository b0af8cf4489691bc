"""A base as an adapter names it: as it is where the names meet, else by the layout under which all of them do.

Adapters carry the names that their network had in memory when it was trained, bases those of their files. Two views of a base bridge
the two: under the names its tensors have in memory, and under names of files that lead to the same (those of an older transformers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from loratools.alignment import align
from loratools.deltas.base import Delta
from loratools.deltas.parameters import OnParameter
from loratools.errors import AmbiguousError, LoratoolsError, UnsupportedError
from loratools.layouts.places import Fused, Same, Where, Within, collected, inside, put, shown
from loratools.layouts.rules import Layouts, Place, Refused
from loratools.refs import Spec

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a name: the 1 of w1 is none
Aligned = tuple[dict[str, str], list[str]]  # names of the adapter to names of the view, and what to say of it


@dataclass(frozen=True)
class View:
    """`specs` by the names that an adapter may use, and `where` they lie; `refused` says of other names why there is no such tensor."""

    specs: Mapping[str, Spec]
    where: Mapping[str, Where] = field(default_factory=dict)
    refused: Mapping[str, LoratoolsError] = field(default_factory=dict)
    title: str = ""
    turns: Callable[[str], bool] = lambda name: False

    def place(self, settled: Mapping[str, Delta]) -> tuple[dict[str, Delta], list[LoratoolsError]]:
        """The deltas by the base's own names, and what cannot lie there."""
        return put(settled, self.where)

    def said(self, names: Iterable[str]) -> list[str]:
        """What was aligned for the names of an adapter, nothing where it was nothing."""
        it = {name: self.where.get(name, Same(name)) for name in names}
        other = sum(it[name] != Same(name) for name in it)
        if not other:
            return []
        stacks = [place for place in it.values() if isinstance(place, Fused)]
        rows = [place.base for place in it.values() if isinstance(place, Within)]
        said = f"names aligned: {other} of {len(it)} are others in the base's file ({self.title})"
        count = sum(len(stack.matrices) for stack in stacks)
        said += f"; {len(stacks)} fused tensors are {count} matrices there" if stacks else ""
        return [said + (f"; {len(rows)} matrices lie in {len(set(rows))} fused tensors there" if rows else "")]


def view_of(
    deltas: Mapping[str, Delta], base: Mapping[str, Spec], known: Layouts | None, others: Callable[[], Iterable[Layouts]], fixed: set[str]
) -> tuple[View, Aligned]:
    """The view under which an adapter's names meet the base, with its names there.

    As it is, if all names meet so; else by the layout of the model (`known`), else, where the base does not say which model it is,
    by any of `others` under which all do. A tensor that the base need not have, such as a head, is found rather than added. `fixed`
    names are the user's and mean the base's own. Raises AmbiguousError where two views would have a name on different tensors.
    """
    plain = View(base, turns=known.turns if known else lambda name: False)
    first = _Try(plain, deltas)
    tries, open_ = [first], bool(first.lost or first.loose)
    if known and (open_ or _moves(known, deltas, base)):
        tries += _tries(known, deltas, base, fixed, short=not open_)
    elif open_ and not known:
        found = [item for layout in _likely(others(), deltas, base) for item in _tries(layout, deltas, base, fixed, short=False)]
        tries += [item for item in found if not item.lost and not item.loose]
    complete = [item for item in tries if not item.lost]
    if not complete:
        chosen = min(tries, key=lambda item: item.lost)
        refused = {name: why for item in tries for name, why in item.view.refused.items()}
        view = View(chosen.view.specs, chosen.view.where, refused, chosen.view.title, chosen.view.turns)
        return view, chosen.aligned()
    fewest = min(item.loose for item in complete)
    best = sorted((item for item in complete if item.loose == fewest), key=lambda item: len(item.notes))
    _check_alike(best)
    return best[0].view, best[0].aligned()


class _Try:
    """An adapter's names under one view: what they are there, and how many have no tensor, of those that need one and of others."""

    def __init__(self, view: View, deltas: Mapping[str, Delta]) -> None:
        self.view = view
        self.error: LoratoolsError | None = None
        needing = [name for name, delta in deltas.items() if delta.needs_base]
        try:
            found, self.notes = align({name: name for name in deltas}, needing, view.specs)
            self.names = {name: place for place, name in found.items()}
        except LoratoolsError as error:
            self.error, self.names, self.notes = error, {name: name for name in deltas}, []
        unmet = [name for name in deltas if self.error or not _met(name, self.names[name], deltas[name], view.specs)]
        self.lost = sum(deltas[name].needs_base for name in unmet)
        self.loose = len(unmet) - self.lost

    def aligned(self) -> Aligned:
        if self.error is not None:
            raise self.error
        return self.names, self.notes

    def where(self, name: str) -> Where:
        place = self.names[name]
        return self.view.where.get(place, Same(place))


def _met(name: str, place: str, delta: Delta, specs: Mapping[str, Spec]) -> bool:
    if place in specs:
        return True
    module = place.rpartition(".")[0]
    choices = delta.choices if isinstance(delta, OnParameter) else ()
    return any(f"{module}.{choice.name.rpartition('.')[2]}" in specs for choice in choices)


def _check_alike(complete: list[_Try]) -> None:
    first = complete[0]
    for other in complete[1:]:
        name = next((name for name in first.names if first.where(name) != other.where(name)), None)
        if name is not None:
            told = [f"{shown(item.where(name))} ({item.view.title or 'as it is'})" for item in (first, other)]
            fact, remedy = "the adapter's name is that of several of the base's tensors", "give --rename OLD=NEW"
            raise AmbiguousError(fact, tensor=name, found=" or ".join(told), remedy=remedy)


def _tries(layout: Layouts, deltas: Mapping[str, Delta], base: Mapping[str, Spec], fixed: set[str], *, short: bool) -> list[_Try]:
    """The names under the base as in memory, and unless `short` or they meet there, by names of files that lead there."""
    found = layout.places(list(base))
    places = {name: place for name, place in found.items() if isinstance(place, Place)}
    there = collected(places, base)
    converted = {inner: (name, place) for name, place in found.items() if isinstance(place, Refused) for inner in place.names}
    refused = there.faults | {inner: _converted(inner, name, place.operation) for inner, (name, place) in converted.items()}
    own = {name: base[name] for name in fixed if name in base}
    where: dict[str, Where] = there.where | {name: Same(name) for name in own}
    memory = _Try(View(there.specs | own, where, refused, layout.title, layout.turns), deltas)
    if short or not (memory.lost or memory.loose):
        return [memory]
    return [memory, _Try(_translated(layout, deltas, where, there.specs, own), deltas)]


def _converted(name: str, other: str, operation: str) -> LoratoolsError:
    remedy = "merge it with transformers and peft"
    fact = "transformers converts this tensor between file and memory, which is not done here"
    return UnsupportedError(fact, tensor=name, found=f"{other}, by {operation}", remedy=remedy)


def _translated(
    layout: Layouts, deltas: Mapping[str, Delta], where: Mapping[str, Where], specs: Mapping[str, Spec], own: Mapping[str, Spec]
) -> View:
    names = [name for name in deltas if name not in own]
    led = layout.places(names)
    refused = {name: _converted(name, place.names[0], place.operation) for name, place in led.items() if isinstance(place, Refused)}
    places = {name: place for name, place in led.items() if isinstance(place, Place)}
    places |= {name: place for name, place in _alike(layout, places, specs) if name not in own}
    there: dict[str, Where] = {name: Same(name) for name in own}
    found = dict(own)
    for name, place in places.items():
        if place.name not in where:
            continue
        it = (where[place.name], specs[place.name])
        at = it if place.expert is None else inside(place, *it)
        if at is not None:
            there[name], found[name] = at
    return View(found, there, refused, layout.title, layout.turns)


def _alike(layout: Layouts, places: Mapping[str, Place], specs: Mapping[str, Spec]) -> Iterator[tuple[str, Place]]:
    """The names that other layers and experts have, spelt as the adapter spells those that it holds."""
    kinds = {_unnumbered(name): (name, place) for name, place in places.items()}
    by_shape: dict[str, list[str]] = {}
    for name in specs:
        by_shape.setdefault(_unnumbered(name), []).append(name)
    for name, place in kinds.values():
        for other in by_shape.get(_unnumbered(place.name), ()):
            experts = [None] if place.expert is None else range(specs[other].shape[0])
            for expert in experts:
                meant = Place(other, expert, place.part, place.parts)
                for text in _spellings(name, other, expert):
                    if text in places:
                        break
                    if layout.places([text])[text] == meant:
                        yield text, meant
                        break


def _spellings(name: str, other: str, expert: int | None) -> Iterator[str]:
    """The name with the numbers of another, and an expert's at any place among them."""
    numbers = _NUMBER.findall(other)
    tried = [numbers] if expert is None else [[*numbers[:at], str(expert), *numbers[at:]] for at in range(len(numbers), -1, -1)]
    for row in tried:
        if len(row) == len(_NUMBER.findall(name)):
            yield "".join(part + number for part, number in zip(_NUMBER.split(name), [*row, ""], strict=True))


def _moves(layout: Layouts, deltas: Mapping[str, Delta], base: Mapping[str, Spec]) -> bool:
    """Whether a name of the adapter is another tensor's in memory, if the layout holds: only then can it mean two."""
    kinds = {_unnumbered(name): name for name in base}.values()
    led = layout.places([*deltas, *kinds])
    return any(led[name] != Place(name) for name in deltas)


def _likely(layouts: Iterable[Layouts], deltas: Mapping[str, Delta], base: Mapping[str, Spec]) -> list[Layouts]:
    """The layouts that may have all names meet, one of each effect: judged by one tensor of each kind, layers and experts being alike."""
    kinds = list({_unnumbered(name): name for name in base}.values())
    mine = list({_unnumbered(name): name for name in deltas}.values())
    found: dict[tuple[Place | Refused, ...], Layouts] = {}
    for layout in sorted(layouts, key=lambda layout: layout.size):
        led, translated = layout.places(kinds), layout.places(mine)
        there = {_unnumbered(place.name) for place in led.values() if isinstance(place, Place)}
        sets = (mine, [place.name for place in translated.values() if isinstance(place, Place)])
        if any(len(names) == len(mine) and all(_ends_alike(name, there, deltas.get(name)) for name in names) for names in sets):
            found.setdefault((*led.values(), *translated.values()), layout)
    return list(found.values())


def _ends_alike(name: str, there: set[str], delta: Delta | None) -> bool:
    """Whether a kind of name is there, but for a prefix; of a wrapper's, any that it may have."""
    choices = delta.choices if isinstance(delta, OnParameter) else ()
    kinds = {_unnumbered(name), *(_unnumbered(choice.name) for choice in choices)}
    return any(kind == other or kind.endswith(f".{other}") or other.endswith(f".{kind}") for kind in kinds for other in there)


def _unnumbered(name: str) -> str:
    return _NUMBER.sub("#", name)
