"""Which network an adapter's names are of, told by them alone, and what each is called on the side that is wanted.

An adapter names a few of a network's tensors. All of its names under one root must be those of one network of `networks.py`, on either
side. What they leave open (which of two networks; how many layers a UNet's blocks have) is an error only where an answer would depend
on it; a base's names tell it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from loratools.errors import AmbiguousError, LoratoolsError, MatchError
from loratools.flatnames import flatten
from loratools.layouts.evidence import NEVER, Shapes, weight
from loratools.layouts.networks import TEXT, Network, Pair, Pairs, also, form_of, networks, recognised

# layers_per_block: 2 in Stable Diffusion, 1 in networks distilled from it; more where neither can be
_LAYERS, _MORE = (2, 1), (3, 4)
_FIRST = frozenset(("flux", "sd3", "unet", *TEXT))  # before others whose names are the same and whom nothing speaks for
_UPSAMPLER = re.compile(r"(?:^|[._])up_blocks[._]\d+[._]upsamplers[._]")
_BASE = "give the base with --base, whose names tell it"


@dataclass(frozen=True)
class Named:
    """A tensor by its dotted name below the root; where the side that is wanted has another, the pair, and which part of it this is."""

    name: str
    pair: Pair | None = None
    part: int = 0

    def goal(self, side: str) -> object:
        """What becomes of it on a side, by which two networks are compared."""
        if self.pair is None:
            return (self.name,)
        if side == "diffusers":
            return self.pair.diffusers, self.pair.shares, self.pair.how
        return self.pair.original, self.part, self.pair.shares, self.pair.how


@dataclass(frozen=True)
class Naming:
    """A network, and what names of it are; those that it has not are in `named` not. `twins` have the names too, and were passed over."""

    network: Network
    named: Mapping[str, Named]
    layers: int = 0
    pairs: Pairs = field(default_factory=lambda: Pairs({}, {}))
    twins: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"a UNet of {self.layers} layers per block" if self.layers else self.network.name

    def weight(self, shapes: Shapes) -> int:
        """What shapes, by the adapter's names, and numbers of blocks say for this network."""
        own = {self.named[name].name: shape for name, shape in shapes.items() if name in self.named}
        return weight(self.network, self.pairs, [named.name for named in self.named.values()], own)


def naming_of(
    names: Collection[str], role: str, side: str, *, flat: bool, base: Collection[str] = (), network: str | None = None,
    shapes: Shapes | None = None,
) -> Naming:  # fmt: skip
    """The network that has all these names, below one root of an adapter; `base` are a base's below that root.

    A text encoder's names are transformers' on the side of the authors too: OpenCLIP's are a base's alone. Of denoisers `network` is the
    one, where it is given; else the `shapes` of the weights and the numbers of blocks choose among those that have all names
    (`evidence.py`), and Flux, SD3 and Stable Diffusion go before others. Raises MatchError for names of no network here, AmbiguousError
    for those that two would call differently.
    """
    found = list(_namings(names, role, side, flat=flat, base=base, network=network))
    whole = [naming for naming in found if len(naming.named) == len(names)]
    if not whole:
        raise _unknown(names, max(found, key=lambda naming: len(naming.named), default=None), network)
    goals = [{name: named.goal(side) for name, named in naming.named.items()} for naming in whole]
    if all(goal == goals[0] for goal in goals):
        return whole[0]
    weights = [naming.weight(shapes or {}) for naming in whole]
    best = _likeliest(whole, weights)
    other = next((index for index in best if goals[index] != goals[best[0]]), None)
    if other is not None:
        one = whole[best[0]]
        open_ = next(name for name in names if goals[best[0]][name] != goals[other][name])
        fact = "its names are those of two networks, which are called differently on the other side"
        remedy = _BASE if one.layers else f"{_BASE}, or name the network: --network {one.network.name}"
        raise AmbiguousError(fact, tensor=open_, found=f"{one.title} or {whole[other].title}", remedy=remedy)
    passed = [index for index, each in enumerate(weights) if each >= max(0, weights[best[0]]) and goals[index] != goals[best[0]]]
    return replace(whole[best[0]], twins=tuple(whole[index].network.name for index in passed))


def _likeliest(whole: list[Naming], weights: list[int]) -> list[int]:
    """Those for whom most speaks: of the first networks, unless more speaks for others, or the names cannot be theirs."""
    first = [index for index, naming in enumerate(whole) if naming.network.name in _FIRST]
    most, other = (max((weights[index] for index in indices), default=NEVER) for indices in (first, set(range(len(whole))) - {*first}))
    if first and other <= (max(most, 0) if most != NEVER else NEVER):
        return [index for index in first if weights[index] == most]
    return [index for index, each in enumerate(weights) if each == other and index not in first]


def _namings(
    names: Collection[str], role: str, side: str, *, flat: bool, base: Collection[str], network: str | None
) -> Iterator[Naming]:
    known = recognised(base) if base else None
    if known is not None:
        yield _naming(known[0], known[0].pairs(base, whole=True), names, side, flat=flat)
        return
    asked = [found for found in networks() if network is None or found.name in (network, *TEXT)]
    candidates = [found for found in asked if role == "any" or (found.name in TEXT) != (role == "denoiser")]
    forms = {form_of(name) for name in names}
    most = max((len(forms & found.forms) for found in candidates), default=0)
    for found in candidates if most else ():
        if len(forms & found.forms) < most:
            continue  # others have more of its names
        if found.name != "unet":
            yield _naming(found, found.pairs(names, whole=False), names, side, flat=flat)
            continue
        made = [_naming(found, found.pairs(names, whole=False, layers=n), names, side, flat=flat, layers=n) for n in _LAYERS]
        if not any(len(naming.named) == len(names) for naming in made):
            made += [_naming(found, found.pairs(names, whole=False, layers=n), names, side, flat=flat, layers=n) for n in _MORE]
        yield from made


def _naming(network: Network, pairs: Pairs, names: Collection[str], side: str, *, flat: bool, layers: int = 0) -> Naming:
    theirs = {name: Named(name) for pair in pairs.original.values() for name in pair.diffusers}
    own = {name: Named(name) for name in pairs.original}
    if side == "diffusers":
        index = {name: Named(name, pair) for name, pair in pairs.original.items()} | theirs
    elif network.name in TEXT:
        index = own | theirs
    else:
        index = {name: Named(name, pair, part) for name, (pair, part) in pairs.diffusers.items()} | own
    index |= {word: named for name, named in index.items() for word in also(name) if word not in index}
    words = {flatten(name): named for name, named in index.items()} if flat else index
    found = {name: words.get(flatten(name) if flat else name) for name in names}
    return Naming(network, {name: named for name, named in found.items() if named is not None}, layers, pairs)


def _unknown(names: Collection[str], best: Naming | None, network: str | None) -> LoratoolsError:
    lacking = [name for name in names if best is None or name not in best.named]
    if all(map(_UPSAMPLER.search, lacking)):
        fact = "whether its block has attentions, beside which an upsampler's name is another, its names do not tell"
        return AmbiguousError(fact, tensor=lacking[0], remedy=_BASE)
    shown = ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
    remedy = "leave out --layout, or give the base with --base if it is one of these under names of another program"
    if best is None or not best.named:
        expected = f"those of {', '.join(found.name for found in networks())}" if network is None else f"those of {network}"
        return MatchError("names of no network that is known by two layouts", found=shown, expected=expected, remedy=remedy)
    return MatchError(f"{len(lacking)} of {len(names)} names are not {best.network.name}'s, the others are", found=shown, remedy=remedy)
