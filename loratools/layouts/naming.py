"""Which network an adapter's names are of, told by them alone, and what each is called on the side that is wanted.

An adapter names a few of a network's tensors. All of its names under one root must be those of one network of `networks.py`, on either
side. What they leave open (which of two networks; how many layers a UNet's blocks have) is an error only where an answer would depend
on it; a base's names tell it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from loratools.errors import AmbiguousError, LoratoolsError, MatchError
from loratools.flatnames import flatten
from loratools.layouts.networks import Network, Pair, Pairs, networks, recognised

_TEXT = ("clip", "t5")
# layers_per_block: 2 in Stable Diffusion, 1 in networks distilled from it; more where neither can be
_LAYERS, _MORE = (2, 1), (3, 4)
_UPSAMPLER = re.compile(r"(?:^|[._])up_blocks[._]\d+[._]upsamplers[._]")
_BASE = "give the base with --base, whose names tell it"


@dataclass(frozen=True)
class Named:
    """A tensor by its dotted name below the root; where the side that is wanted has another, the pair, and which part of it this is."""

    name: str
    pair: Pair | None = None
    part: int = 0


@dataclass(frozen=True)
class Naming:
    """A network, and what names of it are; those that it has not are in `named` not."""

    network: Network
    named: Mapping[str, Named]
    layers: int = 0

    @property
    def title(self) -> str:
        return f"a UNet of {self.layers} layers per block" if self.layers else self.network.name


def naming_of(names: Collection[str], role: str, side: str, *, flat: bool, base: Collection[str] = ()) -> Naming:
    """The network that has all these names, below one root of an adapter; `base` are a base's below that root.

    A text encoder's names are transformers' on the side of the authors too: OpenCLIP's are a base's alone. Raises MatchError for names of
    no network here, AmbiguousError for those that two would call differently.
    """
    found = list(_namings(names, role, side, flat=flat, base=base))
    whole = [naming for naming in found if len(naming.named) == len(names)]
    if not whole:
        raise _unknown(names, max(found, key=lambda naming: len(naming.named)))
    other = next((naming for naming in whole if naming.named != whole[0].named), None)
    if other is not None:
        open_ = next(name for name in names if whole[0].named[name] != other.named[name])
        fact = "its names are those of two networks, which are called differently on the other side"
        raise AmbiguousError(fact, tensor=open_, found=f"{whole[0].title} or {other.title}", remedy=_BASE)
    return whole[0]


def _namings(names: Collection[str], role: str, side: str, *, flat: bool, base: Collection[str]) -> Iterator[Naming]:
    known = recognised(base) if base else None
    if known is not None:
        yield _naming(known[0], known[0].pairs(base, whole=True), names, side, flat=flat)
        return
    for network in networks():
        if role != "any" and (network.name in _TEXT) == (role == "denoiser"):
            continue
        if not any(name.startswith(network.heads) for name in names):
            yield Naming(network, {})
            continue
        if network.name != "unet":
            yield _naming(network, network.pairs(names, whole=False), names, side, flat=flat)
            continue
        made = [_naming(network, network.pairs(names, whole=False, layers=n), names, side, flat=flat, layers=n) for n in _LAYERS]
        if not any(len(naming.named) == len(names) for naming in made):
            made += [_naming(network, network.pairs(names, whole=False, layers=n), names, side, flat=flat, layers=n) for n in _MORE]
        yield from made


def _naming(network: Network, pairs: Pairs, names: Collection[str], side: str, *, flat: bool, layers: int = 0) -> Naming:
    theirs = {name: Named(name) for pair in pairs.original.values() for name in pair.diffusers}
    own = {name: Named(name) for name in pairs.original}
    if side == "diffusers":
        index = {name: Named(name, pair) for name, pair in pairs.original.items()} | theirs
    elif network.name in _TEXT:
        index = own | theirs
    else:
        index = {name: Named(name, pair, part) for name, (pair, part) in pairs.diffusers.items()} | own
    index |= {f"{name}.weight": named for name, named in index.items() if name.endswith(".scale")}  # a bare parameter as its own module
    words = {flatten(name): named for name, named in index.items()} if flat else index
    found = {name: words.get(flatten(name) if flat else name) for name in names}
    return Naming(network, {name: named for name, named in found.items() if named is not None}, layers)


def _unknown(names: Collection[str], best: Naming) -> LoratoolsError:
    lacking = [name for name in names if name not in best.named]
    if all(map(_UPSAMPLER.search, lacking)):
        fact = "whether its block has attentions, beside which an upsampler's name is another, its names do not tell"
        return AmbiguousError(fact, tensor=lacking[0], remedy=_BASE)
    shown = ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
    remedy = "leave out --layout, or give the base with --base if it is one of these under names of another program"
    if not best.named:
        expected = "those of Flux, SD3, Stable Diffusion 1, 2 or XL, or their text encoders"
        return MatchError("names of no network that is known by two layouts", found=shown, expected=expected, remedy=remedy)
    return MatchError(f"{len(lacking)} of {len(names)} names are not {best.network.name}'s, the others are", found=shown, remedy=remedy)
