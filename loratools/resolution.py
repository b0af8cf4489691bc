"""Where an adapter's names meet a base's, the one place: aligned, matched, laid as the weights lie, and put where they are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loratools.deltas.base import Delta
from loratools.deltas.laid import WherePresent
from loratools.deltas.parameters import moved, names_of, settle_parameters
from loratools.errors import LoratoolsError, MatchError, UnsupportedError, raise_all
from loratools.families import Family, of_vocabulary
from loratools.flatnames import meet
from loratools.layouts.bridge import Bridge, bridge_of
from loratools.layouts.switched import unswitched
from loratools.layouts.transformers import every_layout, layouts_of
from loratools.layouts.view import View, view_of
from loratools.orientation import is_turned, settle
from loratools.refs import Spec


@dataclass(frozen=True, kw_only=True)
class Told:
    """What an adapter's file tells of its weights beside their changes.

    `flat` names have underscores for dots (`flatnames`); `numbered` puts the deltas of modules that a file counts under a base's
    names; `expects` are, of a base's specs, the tensors it promises to change; a `flagged` one has seen weights stored transposed;
    `straight` says why it can change none that are, where it cannot.
    """

    flat: bool = False
    numbered: Callable[[Mapping[str, Delta], Mapping[str, Spec]], Mapping[str, Delta]] | None = None
    expects: Callable[[Mapping[str, Spec]], Iterable[str]] | None = None
    flagged: bool = False
    straight: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Deltas by a base's names, what a person should be told, and how many were left out since the base lacks their tensor."""

    deltas: Mapping[str, Delta]
    notes: tuple[str, ...]
    left: int


def resolve(
    deltas: Mapping[str, Delta],
    base: Mapping[str, Spec],
    family: Family,
    *,
    told: Told,
    renames: Sequence[tuple[str, str]] = (),
    allow_unmatched: bool = False,
) -> Resolved:
    """The deltas of an adapter under the base's names, each known to fit its weight; raises what `Adapter.resolve` says."""
    renamed = unswitched(_renamed(deltas, renames), base)
    bridge = bridge_of(renamed, base, flat=told.flat)
    dotted = _dotted(renamed, bridge.specs) if told.flat else renamed
    named = told.numbered(dotted, base) if told.numbered is not None else dotted
    fixed = {name for name in named if name in base and name not in deltas}
    view, (names, notes) = view_of(named, bridge.specs, layouts_of(family), lambda: () if family.types else every_layout(), fixed)
    meeting = _Meeting(view, bridge, family, told, allow_unmatched, list(notes))
    matched = meeting.match(meeting.align(named, names))
    settled = meeting.settle(matched)
    if not meeting.faults and not allow_unmatched and told.expects is not None:
        expected = told.expects(family.concerned(view.specs, settled))
        meeting.faults += [_missing(name) for name in expected if name not in settled]
    raise_all(meeting.faults)
    placed = meeting.place(settled, base)
    return Resolved(deltas=placed, notes=tuple(meeting.notes), left=len(meeting.unmatched))


@dataclass
class _Meeting:
    """One adapter and one view of a base: each step hands its deltas to the next, and leaves its faults, notes and strays here."""

    view: View
    bridge: Bridge
    family: Family
    told: Told
    allow_unmatched: bool
    notes: list[str]
    faults: list[LoratoolsError] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    refused: Mapping[str, LoratoolsError] = field(default_factory=dict)

    def align(self, named: Mapping[str, Delta], names: Mapping[str, str]) -> dict[str, Delta]:
        """The deltas under the view's names, those of bare parameters settled."""
        placed = {names[name]: moved(delta, name, names[name]) for name, delta in named.items()}
        aligned, unsettled = settle_parameters(placed, self.view.specs, self.family.types, either=self.view.turns)
        self.refused = {} if self.allow_unmatched else _refused(self.view, placed)
        self.faults += [*unsettled, *self.refused.values()]
        return aligned

    def match(self, aligned: Mapping[str, Delta]) -> dict[str, Delta]:
        """Those whose tensor the base has, and new ones; what the base lacks is a fault, or a note with `allow_unmatched`."""
        base = self.view.specs
        aligned = {name: delta for name, delta in aligned.items() if name in base or not isinstance(delta, WherePresent)}
        needing = [name for name, delta in aligned.items() if delta.needs_base]
        strays = [name for name in needing if name not in base]
        if strays and len(strays) == len(needing):
            self.faults += [] if self.refused else [_nothing_matched(strays, base)]
        elif self.allow_unmatched:
            self.unmatched = strays
            self.notes += [f"not applied, the base has no {name}" for name in strays]
            self._check_banks([aligned[name] for name in strays])
        else:
            self.faults += [_stray(name, base) for name in strays if name not in self.refused]
        matched = {name: delta for name, delta in aligned.items() if name in base or not delta.needs_base}
        self.faults += [error for name in matched if name not in base for error in _misplaced(name, base)]
        return matched

    def _check_banks(self, left: Iterable[Delta]) -> None:
        if any(delta.draws and not delta.draws[0].out for delta in left):
            what = "random projections as large as all its layers need, and the base lacks some"
            self.faults.append(UnsupportedError(what, remedy="give the base that it was trained on"))

    def settle(self, matched: Mapping[str, Delta]) -> dict[str, Delta]:
        """Each laid as its weight lies, of the size its weight has."""
        base, straight = self.view.specs, self.told.straight
        settled, ambiguous = settle(matched, base, self.family, flagged=self.told.flagged)
        self.faults += ambiguous
        if straight is not None:
            self.faults += [UnsupportedError(straight, tensor=name) for name, delta in settled.items() if is_turned(delta)]
        for name, delta in settled.items():
            try:
                delta.spec(base.get(name))
                settled[name] = delta.fitted(base[name]) if name in base else delta
            except LoratoolsError as error:
                self.faults.append(error.at(tensor=name))
        return settled

    def place(self, settled: Mapping[str, Delta], disk: Mapping[str, Spec]) -> dict[str, Delta]:
        """The deltas, with the banks they draw on, by the names of the base's own file; the last check of each against its tensor."""
        settled = with_banks(settled)
        self.notes += self.view.said(settled)
        named, apart = self.view.place(settled)
        self.notes += self.bridge.said(named)
        placed, uncut = self.bridge.place(named)
        raise_all([*apart, *uncut])
        for name, delta in placed.items():
            delta.spec(disk.get(name))
        return placed


def _renamed(deltas: Mapping[str, Delta], renames: Sequence[tuple[str, str]]) -> Mapping[str, Delta]:
    if not renames:
        return deltas
    found: dict[str, Delta] = {}
    for name, delta in deltas.items():
        new = rename(name, renames)
        if new in found:
            raise MatchError("two tensors meet under one name after --rename", tensor=new)
        found[new] = moved(delta, name, new)
    if set(found) == set(deltas):
        raise MatchError("--rename changed no name", found=", ".join(f"{old}={new}" for old, new in renames))
    return found


def _dotted(deltas: Mapping[str, Delta], base: Iterable[str]) -> Mapping[str, Delta]:
    """Flat names as the base's that flatten to them; those the base lacks stay as they are."""
    met = meet(deltas, base)
    found: dict[str, Delta] = {}
    words: dict[str, str] = {}
    for word, delta in deltas.items():
        name = met.get(word, word)
        if name in found:
            raise MatchError("two of the adapter's modules are one of the base's", tensor=word, found=f"{words[name]}, both {name}")
        found[name], words[name] = delta, word
    return found


def _missing(name: str) -> MatchError:
    remedy = "the file is incomplete; merge --allow-unmatched goes on without"
    return MatchError("the adapter's config covers this weight, its file holds nothing for it", tensor=name, remedy=remedy)


def rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name with each OLD run of whole components replaced by NEW, in order.

    >>> rename("model.layers.0.mlp.weight", [("model", "language_model.model")])
    'language_model.model.layers.0.mlp.weight'
    """
    for old, new in renames:
        dotted = f".{name}."
        if f".{old}." in dotted:
            name = dotted.replace(f".{old}.", f".{new}." if new else ".", 1).strip(".")
    return name


def _nothing_matched(names: list[str], base: Mapping[str, Spec]) -> MatchError:
    near = ", ".join(difflib.get_close_matches(names[0], base, 2, 0.4)) or ", ".join(list(base)[:2])
    return MatchError(
        f"none of the adapter's {len(names)} weights is in the base",
        tensor=names[0], found=f"a base with {near}, …", remedy="is it another model's? --rename OLD=NEW maps names",
    )  # fmt: skip


def _refused(view: View, deltas: Mapping[str, Delta]) -> dict[str, LoratoolsError]:
    """Why the base has no tensor of some of the adapter's names, where that is known."""
    names = [other for name, delta in deltas.items() for other in names_of(name, delta) if other not in view.specs]
    return {name: view.refused[name] for name in names if name in view.refused}


def _stray(name: str, base: Mapping[str, Spec]) -> MatchError:
    near = difflib.get_close_matches(name, base, 3, 0.6)
    return MatchError(
        "the base has no such weight", tensor=name, found="nearest " + ", ".join(near) if near else None,
        remedy="merge and convert --rename OLD=NEW map it, merge --allow-unmatched leaves it out",
    )  # fmt: skip


def _misplaced(name: str, base: Mapping[str, Spec]) -> list[MatchError]:
    """A new tensor that would stand beside, or inside, what is a layer of the base already: no new head."""
    parts = name.split(".")
    own = 0 if of_vocabulary(name) else 1  # the bias of a tied head is stored or not
    inside = [".".join(parts[:count]) for count in range(1, len(parts) - 1 + own)]
    found = next((held for path in inside for held in (path, f"{path}.weight") if held in base), None)
    return [] if found is None else [MatchError("is new, and the base has a layer there that lacks it", tensor=name, found=found)]


def with_banks(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Fitted deltas with the banks that they draw on, each as large as all of them need it. Raises what `drawn` raises."""
    wanted = {name: draws for name, delta in deltas.items() if (draws := delta.draws)}
    banks = dict.fromkeys(bank for bank, _ in wanted.values())
    sized = {bank: bank.sized([shape for other, shape in wanted.values() if other == bank]) for bank in banks}
    found, faults = dict(deltas), list[LoratoolsError]()
    for name, (bank, _) in wanted.items():
        try:
            found[name] = deltas[name].drawn(sized[bank])
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    return found
