"""A diffusion model's base under the names that an adapter has: other names of its tensors, their rows, or several as one.

Where the base is a network of `networks.py`, and an adapter names tensors as its other side does or under another root, the base's specs
get those names. A tensor under such a name is rows of the base's tensors, in order: of one that is fused there, or of those that are
fused here. Any delta of it is cut to them (`deltas/cut.py`), so the matching itself knows no kind of delta.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from loratools.deltas.base import Delta
from loratools.deltas.compose import Part
from loratools.deltas.cut import cut
from loratools.deltas.laid import turned
from loratools.deltas.parts import joined as joined_parts
from loratools.errors import LoratoolsError, UnsupportedError
from loratools.flatnames import flatten
from loratools.layouts.networks import VERSION, Network, Pair, also, recognised
from loratools.layouts.roots import by_root, joined, split_root, split_word
from loratools.refs import Spec


@dataclass(frozen=True)
class Stretch:
    """Rows [start, stop) of a base's tensor; `whole` where it has no others."""

    base: str
    start: int
    stop: int
    whole: bool


@dataclass(frozen=True)
class Alias:
    """Another name's tensor: the stretches that its rows are, in order, or one tensor's transpose."""

    spec: Spec
    stretches: tuple[Stretch, ...]
    turned: bool = False

    def at(self, root: str) -> Alias:
        """The same of a base whose names begin with a root."""
        return replace(self, stretches=tuple(replace(item, base=joined(root, item.base)) for item in self.stretches))


@dataclass(frozen=True)
class Bridge:
    """`specs` by the names that an adapter may use; `aliases` are those that the base's own file does not have."""

    specs: Mapping[str, Spec]
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    titles: tuple[str, ...] = ()
    spelt: frozenset[str] = frozenset()  # of the aliases, those that are but another spelling of the base's own name

    def place(self, deltas: Mapping[str, Delta]) -> tuple[dict[str, Delta], list[LoratoolsError]]:
        """The deltas by the base's own names; kinds that cannot be cut where their rows lie apart are faults."""
        placed: dict[str, Delta] = {}
        parts: dict[str, list[Part]] = {}
        faults: list[LoratoolsError] = []
        for name, delta in deltas.items():
            try:
                for stretch, piece in _pieces(delta, self.aliases[name]) if name in self.aliases else [(None, delta)]:
                    base = name if stretch is None else stretch.base
                    if base in placed or (base in parts and (stretch is None or stretch.whole)):
                        raise UnsupportedError("two of the adapter's deltas lie on this tensor", found=base)
                    if stretch is None or stretch.whole:
                        placed[base] = piece
                    else:
                        parts.setdefault(base, []).append(Part(delta=piece, start=stretch.start, stop=stretch.stop))
            except LoratoolsError as error:
                faults.append(error.at(tensor=name))
        for base, found in parts.items():
            try:
                placed[base] = joined_parts(found)
            except LoratoolsError as error:
                faults.append(error.at(tensor=base))
        return placed, faults

    def said(self, names: Collection[str]) -> list[str]:
        """What was bridged for the names of an adapter, nothing where it was nothing."""
        met = [name for name in names if name in self.aliases and name not in self.spelt]
        title = ", ".join(self.titles) or "they lie under another root"
        return [f"names aligned: {len(met)} of {len(names)} are others in the base ({title})"] if met else []


def _pieces(delta: Delta, alias: Alias) -> Iterator[tuple[Stretch, Delta]]:
    if alias.turned:
        yield alias.stretches[0], turned(delta)
        return
    at = 0
    for stretch in alias.stretches:
        count = stretch.stop - stretch.start
        yield stretch, delta if len(alias.stretches) == 1 else cut(delta, at, at + count)
        at += count


def bridge_of(names: Collection[str], base: Mapping[str, Spec], *, flat: bool) -> Bridge:
    """The base with the names that an adapter's need in place of its own; as it is, where they meet without."""
    specs, aliases, titles, spelt = dict(base), dict[str, Alias](), list[str](), set[str]()
    alone = len({split_root(name)[1] for name in names}) == 1  # a prefix that all have is aligned as any model's
    for (role, root), rests in by_root(base).items():
        wanted = _wanted(names, role if root else None, flat=flat)
        model = _Model(root, {rest: base[joined(root, rest)] for rest in rests}, wanted, flat)
        found = None if model.met else recognised(model.own)
        needed = model.needed(found, alone=alone)
        new, gone = model.bridged(found, needed) if needed else model.respelt()
        for name in gone:
            del specs[name]
        aliases |= new
        spelt |= set() if needed else set(new)
        titles += [f"{found[0].name}, {found[0].title(found[1])} names, diffusers {VERSION}"] if needed and found else []
    specs |= {name: alias.spec for name, alias in aliases.items()}
    return Bridge(specs, aliases, tuple(titles), frozenset(spelt))


@dataclass(frozen=True)
class _Model:
    """A base's model below one root, and what an adapter wants of it: (root or prefix, rest), flat or not."""

    root: str
    own: Mapping[str, Spec]
    wanted: list[tuple[str, str]]
    flat: bool

    @cached_property
    def spellings(self) -> dict[str, str]:
        """Other spellings of its names that the adapter has, with the names; none that is another tensor's on the other side.

        Such is that of OpenCLIP's projection, a bare parameter, which transformers has turned, as the weight of a module.
        """
        ends, own = {rest for _, rest in self.wanted}, self.own
        found = {word: rest for rest in own for word in also(rest) if self._word(word) in ends and word not in own}
        known = recognised(own) if found else None
        there = known[0].pairs(own, whole=True).diffusers if known is not None and known[1] == "original" else {}
        return {word: rest for word, rest in found.items() if word not in there}

    @cached_property
    def words(self) -> dict[str, str]:
        """Its names, and those spellings, as the adapter has them."""
        return {self._word(rest): rest for rest in (*self.own, *self.spellings)}

    @property
    def met(self) -> bool:
        return all(rest in self.words for _, rest in self.wanted)

    def _word(self, rest: str) -> str:
        return flatten(rest) if self.flat else rest

    def _others(self, found: tuple[Network, str] | None) -> dict[str, Alias]:
        pairs = found[0].pairs(self.own, whole=True).original.values() if found is not None else ()
        return dict(_others(pairs, self.own, found[1])) if found is not None else {}

    def _alias(self, rest: str) -> Alias:
        own = self.spellings.get(rest, rest)
        return _same(joined(self.root, own), self.own[own])

    def needed(self, found: tuple[Network, str] | None, *, alone: bool) -> set[str]:
        """The adapter's roots under which this model must be looked at: as the network's other side, or since its own is another."""
        there = {self._word(rest) for rest in self._others(found)}
        elsewhere = {mine for mine, _ in self.wanted if mine and self.root and mine != self.root} if not self.flat else set()
        far = elsewhere if found is not None else {mine for mine in elsewhere if not (alone and self.root.endswith(f".{mine}"))}
        return {mine for mine, rest in self.wanted if rest in there or (mine in far and rest in self.words)}

    def bridged(self, found: tuple[Network, str] | None, needed: Iterable[str]) -> tuple[dict[str, Alias], list[str]]:
        """The aliases under those roots, and the base's names that the adapter does not use as they are."""
        kept = {joined(self.root, self.words[rest]) for mine, rest in self.wanted if self._kept(mine, rest)}
        gone = [name for name in (joined(self.root, rest) for rest in self.own) if name not in kept]
        aliases: dict[str, Alias] = {}
        for mine in needed:
            at = self.root if self.flat else mine
            aliases |= {joined(at, rest): alias.at(self.root) for rest, alias in self._others(found).items()}
            aliases |= {joined(at, rest): self._alias(rest) for rest in (*(self.own if at != self.root else ()), *self.spellings)}
        return {name: alias for name, alias in aliases.items() if name not in kept}, gone

    def _kept(self, mine: str, rest: str) -> bool:
        return self.words.get(rest) in self.own and (self.flat or mine == self.root)

    def respelt(self) -> tuple[dict[str, Alias], list[str]]:
        """The other spellings that the adapter has, and the base's own that it has not."""
        met = {self.words[rest] for _, rest in self.wanted if rest in self.words}
        gone = dict.fromkeys(joined(self.root, rest) for rest in self.spellings.values() if rest not in met)
        return {joined(self.root, word): self._alias(word) for word in self.spellings}, list(gone)


def _wanted(names: Iterable[str], role: str | None, *, flat: bool) -> list[tuple[str, str]]:
    """(root or prefix, rest) of an adapter's names that belong to a model, or to any; the rest of a flat one is flat altogether."""
    if flat:
        found = (split_word(name) for name in names)
        return [(item[1], flatten(item[2])) for item in found if item is not None and role in (None, item[0])]
    return [(mine, rest) for (other, mine), rests in by_root(names).items() if role in (None, other) for rest in rests]


def _same(name: str, spec: Spec) -> Alias:
    return Alias(spec, (Stretch(name, 0, spec.matrix[0], True),))


def _others(pairs: Iterable[Pair], own: Mapping[str, Spec], side: str) -> Iterator[tuple[str, Alias]]:
    """The tensors of the other side that the base's make, by their names there; none of those whose rows are not as the table says."""
    for pair in pairs:
        if side == "original" and pair.original in own:
            yield from _diffusers(pair, own)
        elif side == "diffusers" and all(name in own for name in pair.diffusers):
            alias = _original(pair, own)
            yield from ((name, alias) for name in (pair.original, *also(pair.original)))


def _diffusers(pair: Pair, own: Mapping[str, Spec]) -> Iterator[tuple[str, Alias]]:
    spec = own[pair.original]
    starts = pair.starts(spec.matrix[0])
    if len(pair.diffusers) == 1:
        yield pair.diffusers[0], _alone(pair, pair.original, own)
    elif starts is not None:
        for part, name in enumerate(pair.diffusers):
            start, stop = starts[part], starts[part + 1]
            yield name, Alias(replace(spec, shape=(stop - start, *spec.shape[1:])), (Stretch(pair.original, start, stop, False),))


def _original(pair: Pair, own: Mapping[str, Spec]) -> Alias:
    if len(pair.diffusers) == 1:
        return _alone(pair, pair.diffusers[0], own)
    specs = [own[name] for name in pair.diffusers]
    stretches = tuple(Stretch(name, 0, spec.matrix[0], True) for name, spec in zip(pair.diffusers, specs, strict=True))
    return Alias(replace(specs[0], shape=(sum(item.stop for item in stretches), *specs[0].shape[1:])), stretches)


def _alone(pair: Pair, name: str, own: Mapping[str, Spec]) -> Alias:
    """A tensor that is one on both sides; a bias changes as its weight does."""
    spec = own[name]
    weight = own.get(name.removesuffix("bias") + "weight", spec) if name.endswith("bias") else spec
    if pair.how == "turned":
        return Alias(replace(spec, shape=spec.shape[::-1]), (Stretch(name, 0, spec.matrix[0], True),), turned=True)
    if pair.swapped(weight.shape):
        rows = spec.matrix[0]
        return Alias(spec, (Stretch(name, rows // 2, rows, False), Stretch(name, 0, rows // 2, False)))
    return _same(name, spec)
