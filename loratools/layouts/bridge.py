"""A diffusion model's base under the names that an adapter has: other names of its tensors, their rows, or several as one.

Where the base is a network of `networks.py`, and an adapter names tensors as its other side does or under another root, the base's specs
get those names. A tensor under such a name is rows of the base's tensors, in order: of one that is fused there, or of those that are
fused here. Any delta of it is cut to them (`deltas/cut.py`), so the matching itself knows no kind of delta.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from loratools.deltas.base import Delta
from loratools.deltas.compose import Part
from loratools.deltas.cut import cut
from loratools.deltas.laid import turned
from loratools.deltas.parts import joined as joined_parts
from loratools.errors import LoratoolsError, UnsupportedError
from loratools.flatnames import flatten
from loratools.layouts.networks import VERSION, Pair, recognised
from loratools.layouts.roots import by_root, joined, split_word
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
        met = [name for name in names if name in self.aliases]
        title = ", ".join(self.titles)
        return [f"names aligned: {len(met)} of {len(names)} are others in the base ({title}, diffusers {VERSION})"] if met else []


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
    specs, aliases, titles = dict(base), dict[str, Alias](), list[str]()
    for (role, root), rests in by_root(base).items():
        wanted = _wanted(names, role, flat=flat)
        own = {rest: base[joined(root, rest)] for rest in rests}
        words = {flatten(rest): rest for rest in own} if flat else dict(zip(own, own, strict=True))
        if all(rest in words for _, rest in wanted):
            continue
        found = recognised(own)
        if found is None:
            continue
        network, side = found
        other = dict(_others(network.pairs(rests, whole=True).original.values(), own, side))
        there = {flatten(rest) if flat else rest for rest in other}
        needed = {mine for mine, rest in wanted if rest in there or (mine and root and mine != root and rest in words)}
        if not needed:
            continue
        kept = {joined(root, words[rest]) for mine, rest in wanted if rest in words and (flat or mine == root)}
        for name in [name for name in (joined(root, rest) for rest in own) if name not in kept]:
            del specs[name]
        for mine in needed:
            at = root if flat else mine
            new = {joined(at, rest): alias.at(root) for rest, alias in other.items()}
            new |= {} if at == root else {joined(at, rest): _same(joined(root, rest), spec) for rest, spec in own.items()}
            aliases |= {name: alias for name, alias in new.items() if name not in kept}
        titles.append(f"{network.name}, {network.title(side)} names")
    specs |= {name: alias.spec for name, alias in aliases.items()}
    return Bridge(specs, aliases, tuple(titles))


def _wanted(names: Iterable[str], role: str, *, flat: bool) -> list[tuple[str, str]]:
    """(root or prefix, rest) of an adapter's names that belong to a model; the rest of a flat one is flat altogether."""
    if flat:
        found = (split_word(name) for name in names)
        return [(item[1], flatten(item[2])) for item in found if item is not None and item[0] == role]
    return [(mine, rest) for (other, mine), rests in by_root(names).items() if other == role for rest in rests]


def _same(name: str, spec: Spec) -> Alias:
    return Alias(spec, (Stretch(name, 0, spec.matrix[0], True),))


def _others(pairs: Iterable[Pair], own: Mapping[str, Spec], side: str) -> Iterator[tuple[str, Alias]]:
    """The tensors of the other side that the base's make, by their names there; none of those whose rows are not as the table says."""
    for pair in pairs:
        if side == "original" and pair.original in own:
            yield from _diffusers(pair, own)
        elif side == "diffusers" and all(name in own for name in pair.diffusers):
            yield pair.original, _original(pair, own)


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
