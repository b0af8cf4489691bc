"""What the trainers' formats share: pieces of modules that become deltas by the names of transformers, and the way back.

`layouts/trainers.tsv` has the names and the orders of rows; `_pieces` takes factors apart and puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, NotExpressible, ShapeError, raise_all
from loratools.formats._heads import REMEDY, Heads, heads_of, rows_of, text_config
from loratools.formats._pieces import Piece, Waiting, apart, piece_of, together
from loratools.formats._refused import nothing, passengers
from loratools.formats.base import Container, ReadOptions
from loratools.layouts.trainers import Family, Leaf, Row, families, family_of, named


@dataclass(frozen=True)
class Model:
    """What is known of the model that an adapter belongs to, from the trainer's side files or the base's config."""

    family: Family | None
    heads: Heads | None
    config: Mapping[str, Any]

    @classmethod
    def of(cls, trainer: str, config: Mapping[str, Any]) -> Model:
        """Raises FormatError for a `model_type` whose modules the trainer's table does not have."""
        kind = text_config(config).get("model_type")
        family = family_of(trainer, kind)
        if kind is not None and family is None:
            known = ", ".join(name for family in families(trainer) for name in family.types)
            raise FormatError(f"how {trainer} names this model's modules is not known here", found=kind, expected=f"one of {known}")
        return cls(family, heads_of(config), config)


@dataclass(frozen=True)
class Reading:
    """A trainer's adapter: read by what lies beside it, and once more when the config of its base is known.

    `depends` is what depends on the model, for the message where nothing tells which it is.
    """

    container: Container
    options: ReadOptions
    depends: ClassVar[str] = "what its modules are in transformers"

    def now(self) -> Adapter:
        """The adapter as far as its own files tell of its model, and the rest of it as `pending`."""
        try:
            return replace(self.adapter(self.beside), pending=self.pending)
        except LoratoolsError as error:
            raise error.at(file=self.container.path) from None

    def pending(self, config: Mapping[str, Any]) -> Adapter:
        """The adapter by the config of its base. Raises MatchError where its own has other heads, AmbiguousError where neither tells."""
        try:
            if not text_config(config or self.beside).get("model_type"):
                raise self.unknown()
            own, there = heads_of(self.beside), heads_of(config)
            if own and there and own != there:
                raise MatchError("its heads, in config.json, are not the base's", found=own, expected=there)
            return self.adapter(config or self.beside)
        except LoratoolsError as error:
            raise error.at(file=self.container.path) from None

    @property
    def beside(self) -> Mapping[str, Any]:
        """The model's config.json beside the file, or nothing."""
        found: Mapping[str, Any] = self.container.beside.get("config.json", {})
        return found

    @classmethod
    def unknown(cls) -> AmbiguousError:
        fact = f"{cls.depends} depends on the model, which nothing tells"
        return AmbiguousError(fact, remedy="give --base the model, or put its config.json beside the adapter")

    def adapter(self, config: Mapping[str, Any]) -> Adapter:
        """The adapter of a model with this config, its modules under the trainer's own names where it tells none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Part:
    """A piece on its way: what it is in transformers, and the numbers of its layer and expert."""

    leaf: Leaf
    numbers: tuple[str, ...]
    piece: Piece


def deltas_of(parts: Iterable[Part], heads: Heads | None) -> dict[str, Delta]:
    """Deltas by the names of transformers; pieces of one fused weight become one. Raises FormatError for two of one slot."""
    found: dict[str, Delta] = {}
    fused: dict[str, list[Part]] = {}
    faults: list[LoratoolsError] = []
    for part in parts:
        name = f"{named(part.leaf.name, part.numbers)}.weight"
        if part.leaf.order != "whole":
            fused.setdefault(name, []).append(part)
        elif name in found:
            faults.append(FormatError("two modules that are one in transformers", tensor=name))
        else:
            found[name] = part.piece.delta()
    for name, group in fused.items():
        try:
            found[name] = _fused(group, heads)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    return found


def _fused(group: list[Part], heads: Heads | None) -> Delta:
    group = sorted(group, key=lambda part: part.leaf.slot)
    if len({part.leaf.slot for part in group}) < len(group):
        raise FormatError("two modules that are the same rows in transformers")
    order = group[0].leaf.order
    if order == "halves":
        total = 2 * group[0].piece.rows
    elif heads is None:
        raise AmbiguousError("where its rows lie depends on the model's heads, which nothing tells", remedy=REMEDY)
    else:
        total = heads.fused
    placed = []
    for part in group:
        rows = rows_of(order, part.leaf.slot, total, heads)
        if len(rows) != part.piece.rows:
            raise ShapeError("not as many rows as the model has", found=part.piece.rows, expected=len(rows))
        placed.append((part.piece, rows))
    return together(placed, total).delta()


def waiting(module: str, piece: Piece, why: AmbiguousError) -> tuple[str, Delta]:
    """A module under the trainer's own name, its rows not to be read before a base tells how they lie."""
    return f"{module}.weight", Piece(piece.A, Waiting(piece.B, why), piece.alpha).delta()


# -- writing


@dataclass(frozen=True)
class Module:
    """A trainer's module that is written: its row, its name with numbers, its pieces by slot and the tensors that they are of."""

    row: Row
    name: str
    pieces: dict[int, Piece]
    tensors: dict[int, str]


def modules_of(
    adapter: Adapter, trainer: str, *, want: Callable[[Row], bool] = lambda row: True, plain: str | None = None
) -> tuple[list[Module], Heads | None, Family]:
    """An adapter's deltas as modules of a trainer, in order of their names; `want` tells which rows of its table are written.

    `plain` is that of `piece_of`.

    The model is the base's that it met, else the one its file told, else the only family that has all its names. Raises NotExpressible
    for tensors the trainer has no place for, and where families differ in what they would write, all together.
    """
    model = _model(adapter, trainer)
    faults = passengers(adapter, f"{trainer} has")
    family = model.family or _only(adapter, trainer)
    found: dict[tuple[Row, str], Module] = {}
    for name, delta in adapter.items():
        try:
            for row, module, slot, piece in _taken(family, name, delta, model.heads, want, plain):
                held = found.setdefault((row, module), Module(row, module, {}, {}))
                held.pieces[slot], held.tensors[slot] = piece, name
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    if not found:
        raise nothing(adapter.path)
    return list(found.values()), model.heads, family


def _model(adapter: Adapter, trainer: str) -> Model:
    """The adapter's model, one that the trainer's table has."""
    kind = text_config(adapter.model).get("model_type")
    if kind is None or family_of(trainer, kind) is not None:
        return Model.of(trainer, adapter.model)
    known = ", ".join(name for family in families(trainer) for name in family.types)
    fact, remedy = f"how {trainer} names this model's modules is not known here", "--format peft has the names of any model"
    raise NotExpressible(
        fact, file=adapter.path, tensor=next(iter(adapter), None), found=kind, expected=f"one of {known}", remedy=remedy
    )


def _taken(
    family: Family, name: str, delta: Delta, heads: Heads | None, want: Callable[[Row], bool], plain: str | None
) -> list[tuple[Row, str, int, Piece]]:
    leaves = family.leaf(name.removesuffix(".weight")) if name.endswith(".weight") else []
    leaves = [(row, slot, numbers) for row, slot, numbers in leaves if want(row)]
    if not leaves:
        remedy = "is it of another model? --base names it; --format peft or loratools has the others"
        raise NotExpressible(f"{family.trainer} has no LoRA on this tensor of a {family.name}", remedy=remedy)
    piece, order = piece_of(delta, plain), leaves[0][0].leaves[leaves[0][1]].order
    if order == "whole":
        row, slot, numbers = leaves[0]
        return [(row, named(row.module, numbers), slot, piece)]
    places = [rows_of(order, row.leaves[slot].slot, piece.rows, heads) for row, slot, _ in leaves]
    split = zip(leaves, apart(piece, places), strict=True)
    return [(row, named(row.module, numbers), slot, part) for (row, slot, numbers), part in split if part is not None]


def _only(adapter: Adapter, trainer: str) -> Family:
    """The family that has all names of an adapter, where there is one or all such would write the same."""
    names = [name.removesuffix(".weight") for name in adapter]
    having = [family for family in families(trainer) if all(family.leaf(name) for name in names)]
    first = having[0] if having else families(trainer)[0]
    alike = all([family.leaf(name) for name in names] == [first.leaf(name) for name in names] for family in having)
    if having and not alike:
        fact = f"{trainer} writes models of one naming in several ways, and nothing tells which model it is"
        name = next(name for name in adapter if len({str(family.leaf(name.removesuffix(".weight"))) for family in having}) > 1)
        found = " or ".join(family.name for family in having)
        raise NotExpressible(fact, file=adapter.path, tensor=name, found=found, remedy="convert --base tells it")
    return first
