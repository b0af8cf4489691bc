"""An adapter: base tensor names mapped to deltas, and the one place where its names meet a base's.

Keys are tensor names (`…q_proj.weight`), not module names: merging is then a join on equal keys, and biases, norms and saved
modules need no second concept.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.laid import Turned, Unsettled, WherePresent, turned
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import moved, names_of, settle_parameters
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, UnsupportedError, raise_all
from loratools.families import Family, of_vocabulary
from loratools.flatnames import meet
from loratools.layouts.transformers import every_layout, layouts_of
from loratools.layouts.view import View, view_of
from loratools.tensorfile import Ref, Spec, identity, origin


@dataclass(frozen=True)
class Adapter(Mapping[str, Delta]):
    """Deltas by the name of the base tensor they change.

    `metadata` is what its file said beside the weights, by format; `passengers` are tensors that are no weight edit and are
    carried or refused, never lost; `expects` tells, of a base's specs, which tensors its file promises to change; `notes`
    are what a person should be told; `left` counts the deltas that a base should have a tensor for, and had none; `initial` are
    the files of the adapter as it was initialised, where its own do not tell what it means; names of a `flat` one have underscores
    for dots (`flatnames`).
    """

    deltas: Mapping[str, Delta]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    passengers: Mapping[str, Ref] = field(default_factory=dict)
    path: Path | None = None
    format: str | None = None
    files: tuple[Path, ...] = ()
    expects: Callable[[Mapping[str, Spec]], Iterable[str]] | None = None
    notes: tuple[str, ...] = ()
    left: int = 0
    initial: tuple[Path, ...] = ()
    flat: bool = False

    def __getitem__(self, name: str) -> Delta:
        return self.deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.deltas)

    def __len__(self) -> int:
        return len(self.deltas)

    @property
    def parameters(self) -> int:
        """Elements of its tensors; one that several deltas share, such as a bank of vectors, counts once."""
        refs = [ref for delta in self.values() for ref in delta.refs().values()]
        return sum({identity(ref): origin(ref).spec.numel for ref in refs}.values())

    def map(self, fn: Callable[[str, Delta], Delta]) -> Adapter:
        """The adapter with each delta replaced by fn(name, delta)."""
        return replace(self, deltas={name: fn(name, delta) for name, delta in self.items()})

    def resolve(
        self,
        base: Mapping[str, Spec],
        family: Family | None = None,
        *,
        renames: Iterable[tuple[str, str]] = (),
        allow_unmatched: bool = False,
    ) -> Adapter:
        """The same adapter under the base's names, each delta known to fit its weight.

        A prefix that the whole adapter lacks or has too much is aligned once, and noted; so are names of transformers' in memory and
        in files, with the matrices of fused experts. Raises, all together: MatchError for deltas the base lacks (with the nearest names)
        and for tensors the adapter promises but does not hold, ShapeError for those that do not fit, AmbiguousError for square
        weights whose orientation nothing tells, UnsupportedError for what only a conversion of transformers would bring together.
        """
        family = family or Family({})
        renamed, disk = self._renamed(list(renames))._dotted(base), base
        fixed = {name for name in renamed if name in base and name not in self}
        view, (names, notes) = view_of(renamed.deltas, base, layouts_of(family), lambda: () if family.types else every_layout(), fixed)
        base = view.specs
        placed = {names[name]: moved(delta, name, names[name]) for name, delta in renamed.items()}
        aligned, unsettled = settle_parameters(placed, base, family.types, either=view.turns)
        known = {} if allow_unmatched else _refused(view, placed)
        faults = [error.at(file=self.path) for error in (*unsettled, *known.values())]
        absent = [name for name, delta in aligned.items() if isinstance(delta, WherePresent) and name not in base]
        aligned = {name: delta for name, delta in aligned.items() if name not in absent}
        unmatched = [name for name, delta in aligned.items() if delta.needs_base and name not in base]
        if len(unmatched) == len([delta for delta in aligned.values() if delta.needs_base]) and unmatched:
            faults += [] if known else [_nothing_matched(unmatched, base, self.path)]
            unmatched = []
        elif allow_unmatched:
            notes += [f"not applied, the base has no {name}" for name in unmatched]
        else:
            faults += [_stray(name, base, self.path) for name in unmatched if name not in known]
        matched = {name: delta for name, delta in aligned.items() if name in base or not delta.needs_base}
        faults += [error.at(file=self.path) for name in matched if name not in base for error in _misplaced(name, base)]
        flagged = bool(self.metadata.get("peft", {}).get("fan_in_fan_out"))
        settled, ambiguous = settle(matched, base, family, flagged=flagged)
        faults += [error.at(file=self.path) for error in ambiguous]
        faults += self._straight(settled)
        for name, delta in settled.items():
            try:
                delta.spec(base.get(name))
                settled[name] = delta.fitted(base[name]) if name in base else delta
            except LoratoolsError as error:
                faults.append(error.at(file=self.path, tensor=name))
        if not faults and not allow_unmatched:
            faults += renamed._missing(family.concerned(base, settled), settled)
        if allow_unmatched and any(delta.draws and not delta.draws[0].out for name, delta in aligned.items() if name not in matched):
            what = "random projections as large as all its layers need, and the base lacks some"
            faults.append(UnsupportedError(what, file=self.path, remedy="give the base that it was trained on"))
        raise_all(faults)
        try:
            settled = with_banks(settled)
        except LoratoolsError as error:
            raise error.at(file=self.path) from None
        notes += view.said(settled)
        settled, apart = view.place(settled)
        raise_all(error.at(file=self.path) for error in apart)
        for name, delta in settled.items():
            delta.spec(disk.get(name))
        return replace(self, deltas=settled, notes=(*self.notes, *notes), expects=None, left=len(unmatched), flat=False)

    def _straight(self, settled: Mapping[str, Delta]) -> list[LoratoolsError]:
        """peft's OLoRA moves a part of W as it lies, and adds the change to it turned: for a weight stored (in, out) that is no LoRA."""
        if str(self.metadata.get("peft", {}).get("init_lora_weights")).lower() != "olora":
            return []
        fact = "peft's OLoRA changes weights stored (in, out) as if they were (out, in)"
        return [UnsupportedError(fact, file=self.path, tensor=name) for name, delta in settled.items() if _is_turned(delta)]

    def _renamed(self, renames: list[tuple[str, str]]) -> Adapter:
        if not renames:
            return self
        deltas: dict[str, Delta] = {}
        for name, delta in self.items():
            new = rename(name, renames)
            if new in deltas:
                raise MatchError("two tensors meet under one name after --rename", file=self.path, tensor=new)
            deltas[new] = moved(delta, name, new)
        if set(deltas) == set(self.deltas):
            raise MatchError("--rename changed no name", file=self.path, found=", ".join(f"{old}={new}" for old, new in renames))
        return replace(self, deltas=deltas)

    def _dotted(self, base: Iterable[str]) -> Adapter:
        """A flat adapter under the base's names that flatten to its own; those the base lacks stay as they are."""
        if not self.flat:
            return self
        met = meet(self, base)
        return replace(self, deltas={met.get(word, word): delta for word, delta in self.items()})

    def _missing(self, base: Mapping[str, Spec], settled: Mapping[str, Delta]) -> list[LoratoolsError]:
        if self.expects is None:
            return []
        remedy = "the file is incomplete; give --allow-unmatched to go on without"
        return [
            MatchError("the adapter's config covers this weight, its file holds nothing for it", file=self.path, tensor=name, remedy=remedy)
            for name in self.expects(base)
            if name not in settled
        ]


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


def _nothing_matched(names: list[str], base: Mapping[str, Spec], path: Path | None) -> MatchError:
    near = ", ".join(difflib.get_close_matches(names[0], base, 2, 0.4)) or ", ".join(list(base)[:2])
    return MatchError(
        f"none of the adapter's {len(names)} weights is in the base",
        file=path, tensor=names[0], found=f"a base with {near}, …", remedy="is it another model's? --rename OLD=NEW maps names",
    )  # fmt: skip


def _refused(view: View, deltas: Mapping[str, Delta]) -> dict[str, LoratoolsError]:
    """Why the base has no tensor of some of the adapter's names, where that is known."""
    names = [other for name, delta in deltas.items() for other in names_of(name, delta) if other not in view.specs]
    return {name: view.refused[name] for name in names if name in view.refused}


def _stray(name: str, base: Mapping[str, Spec], path: Path | None) -> MatchError:
    near = difflib.get_close_matches(name, base, 3, 0.6)
    return MatchError(
        "the base has no such weight", file=path, tensor=name, found="nearest " + ", ".join(near) if near else None,
        remedy="give --rename OLD=NEW, or --allow-unmatched to leave it out",
    )  # fmt: skip


def _misplaced(name: str, base: Mapping[str, Spec]) -> list[MatchError]:
    """A new tensor that would stand beside, or inside, what is a layer of the base already: no new head."""
    parts = name.split(".")
    own = 0 if of_vocabulary(name) else 1  # the bias of a tied head is stored or not
    inside = [".".join(parts[:count]) for count in range(1, len(parts) - 1 + own)]
    found = next((held for path in inside for held in (path, f"{path}.weight") if held in base), None)
    return [] if found is None else [MatchError("is new, and the base has a layer there that lacks it", tensor=name, found=found)]


def settle(
    deltas: Mapping[str, Delta], base: Mapping[str, Spec], family: Family, *, flagged: bool = False
) -> tuple[dict[str, Delta], list[LoratoolsError]]:
    """The deltas with every `unknown` orientation decided: by shape, squares by the model's type or the user's globs.

    peft saves only the flag of the last module it wrapped, so the flag of the file (`flagged`) decides no single weight. Where
    neither table nor user says which are transposed a square is linear, unless the flag or another weight of the same adapter
    shows that the model stores some transposed.
    """
    by_shape = {name: _orientation(delta, base[name]) for name, delta in deltas.items() if _open(delta) and name in base}
    mixed = (flagged or "transposed" in by_shape.values()) and not family.tells_transposed
    settled, faults = {}, list[LoratoolsError]()
    for name, delta in deltas.items():
        layer = by_shape.get(name)
        if layer == "either":
            layer = "transposed" if family.transposed(name) else "linear"
            if mixed:
                rows, columns = base[name].matrix
                what = "a square weight" if rows == columns else "a weight that takes its change both ways"
                faults.append(
                    AmbiguousError(
                        f"{what} of a model that stores some weights transposed, and no known model_type to tell which",
                        tensor=name, remedy="name the transposed ones with --transposed GLOB, or add the base's config.json",
                    )
                )  # fmt: skip
        settled[name] = delta if layer is None else oriented(delta, layer)
    return settled, faults


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


def _open(delta: Delta) -> bool:
    """Whether it waits for a base to tell how its weight lies, or whether there is one."""
    if isinstance(delta, Chain):
        return _open(delta.then)
    inner = delta.direction if isinstance(delta, DoRA) else delta
    return isinstance(inner, Unsettled | WherePresent) or (isinstance(inner, LowRank) and inner.layer == "unknown")


def _orientation(delta: Delta, base: Spec) -> str:
    """`linear`, `transposed`, or `either` where a weight takes it both ways."""
    if isinstance(delta, Chain):
        return _orientation(delta.then, base)
    if isinstance(delta, WherePresent) or len(base.shape) != 2:
        return "linear"
    if isinstance(delta, Unsettled) and delta.transposed is not None:
        return "transposed" if delta.transposed else "linear"
    inner = delta.delta if isinstance(delta, Unsettled) else delta.direction if isinstance(delta, DoRA) else delta
    other = replace(base, shape=base.shape[::-1])
    if inner.fits(other):
        return "either" if inner.fits(base) else "transposed"
    return "linear"


def oriented(delta: Delta, layer: str) -> Delta:
    """A delta of unknown orientation as one of `layer`: a transposed weight takes the turned delta."""
    if isinstance(delta, Chain):
        return replace(delta, then=oriented(delta.then, layer))
    if isinstance(delta, Unsettled | WherePresent):
        return turned(delta.delta) if layer == "transposed" else delta.delta
    made = turned(delta) if layer == "transposed" and isinstance(delta, (LowRank, DoRA)) else delta
    if isinstance(made, DoRA) and isinstance(made.direction, LowRank):
        return replace(made, direction=replace(made.direction, layer=layer))
    return replace(made, layer=layer) if isinstance(made, LowRank) else made


def _is_turned(delta: Delta) -> bool:
    inner = delta.direction if isinstance(delta, DoRA) else delta
    return isinstance(inner, Turned) or (isinstance(inner, LowRank) and inner.layer == "transposed")


def is_whole(delta: Delta) -> bool:
    """Whether the delta puts another tensor in the weight's place, bytes and all."""
    return isinstance(delta, Replacement)
