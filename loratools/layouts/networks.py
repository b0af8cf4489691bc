"""Diffusion networks whose tensors have two names: those of their authors' files and those of diffusers, told by one table.

`diffusion-0.42.tsv` beside this file pairs them with open numbers; `Network.pairs` fills in those that an adapter or a base can have. A
UNet's blocks are numbered in one row in the authors' files (`input_blocks.4`, of the LDM code base) and by resolution and layer in
diffusers (`down_blocks.1.resnets.0`): the arithmetic is that of `convert_ldm_unet_checkpoint`, in `_blocks`. The tests hold the table
against diffusers' own conversions, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import product
from pathlib import Path

from loratools.flatnames import flatten

VERSION = "0.42"
SIDES = ("original", "diffusers")
# what a side's names are called: of these networks only, or of whichever it is
TITLES = {"flux": "bfl", "sd3": "mmdit", "unet": "ldm", "clip": "openclip"}
TEXT = ("clip", "t5")  # text encoders; the others are denoisers
_TABLE = Path(__file__).parent / f"diffusion-{VERSION}.tsv"
_LAYERS = 2  # layers_per_block of every Stable Diffusion that was trained from scratch
_MOST = 200  # numbers above are sizes, not places
_BLOCKS = 8


@dataclass(frozen=True)
class Pair:
    """One tensor of the authors' files and what it is in diffusers: another name, rows of several in `shares`, turned, halves swapped."""

    original: str
    diffusers: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    how: str = "same"

    def starts(self, rows: int) -> tuple[int, ...] | None:
        """Where each of diffusers' tensors begins in as many rows, and their end; None where the shares do not divide them."""
        unit, rest = divmod(rows, sum(self.shares))
        return None if rest else tuple(unit * sum(self.shares[:part]) for part in range(len(self.shares) + 1))

    def swapped(self, shape: tuple[int, ...]) -> bool:
        """Whether the halves of a weight of this shape change places."""
        return self.how == "swap" or (self.how == "swap-short" and len(shape) > 1 and shape[0] == 2 * shape[1])


@dataclass(frozen=True)
class Pairs:
    """A network's tensors that have two names, by each of them; of diffusers', with which part it is."""

    original: Mapping[str, Pair]
    diffusers: Mapping[str, tuple[Pair, int]]


@dataclass(frozen=True)
class Network:
    """A network as the table has it: patterns of its tensors, and marks that tell one from others."""

    name: str
    rows: tuple[tuple[str, ...], ...]
    marks: Mapping[str, tuple[re.Pattern[str], ...]] = field(default_factory=dict)
    sizes: tuple[tuple[str, ...], ...] = ()  # what `evidence.py` weighs: `sizes` and `ratio` rows

    def title(self, side: str) -> str:
        return TITLES.get(self.name, side) if side == "original" else side

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """What its tensors' names begin with on either side."""
        words = (word for _, first, second, *_ in self.rows for word in (first, *second.split(" ")))
        return tuple(dict.fromkeys(word.partition(".")[0] for word in words))

    @cached_property
    def forms(self) -> frozenset[str]:
        """All its tensors' names on either side, flat, with every number as #."""
        words = (word + leaf for kind, first, second, *_ in self.rows for word in (first, *second.split(" ")) for leaf in _leaves(kind))
        return frozenset(form_of(name) for word in words for name in (word, *also(word)))

    def side(self, names: Collection[str]) -> str | None:
        """Which names the tensors of a whole network of this kind have; None of another network's."""
        found = (side for side in SIDES if side in self.marks and all(any(map(mark.match, names)) for mark in self.marks[side]))
        return next(found, None)

    def pairs(self, names: Collection[str], *, whole: bool, layers: int | None = None) -> Pairs:
        """The pairs with all numbers that occur in the names, which are those of a whole network or of an adapter, flat or not.

        `layers` are a UNet's `layers_per_block`, which an adapter's names may leave open.
        """
        shape = _Shape.of(names, whole=whole, layers=layers)
        original: dict[str, Pair] = {}
        diffusers: dict[str, tuple[Pair, int]] = {}
        for kind, first, second, *shares in self.rows:
            for numbers in shape.numbers(first + second):
                pair = _pair(kind, first.format_map(numbers), [word.format_map(numbers) for word in second.split(" ")], *shares)
                for leaf in _leaves(kind):
                    made = Pair(pair.original + leaf, tuple(name + leaf for name in pair.diffusers), pair.shares, pair.how)
                    original[made.original] = made
                    if shape.told(numbers):
                        diffusers |= {name: (made, part) for part, name in enumerate(made.diffusers)}
        return Pairs(original, diffusers)


def _leaves(kind: str) -> tuple[str, ...]:
    return ("",) if kind in ("tensor", "turned") else (".weight", ".bias")


def also(name: str) -> tuple[str, ...]:
    """How else a tensor's name is spelt: of CLIP with transformers 5's in memory or in its files, and of bare parameters in files that
    know weights and biases alone: by ComfyUI's as a module of its own; a scale by LyCORIS' as its module's weight.

    >>> also("query_norm.scale"), also("modulation"), also("proj.weight")
    (('query_norm.scale.weight', 'query_norm.weight'), ('modulation.weight',), ())
    >>> also("text_model.encoder.layers.0.mlp.fc1.bias")
    ('encoder.layers.0.mlp.fc1.bias',)
    """
    inner = name.removeprefix("text_model.")
    if inner.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")):
        return (inner if inner != name else f"text_model.{name}",)
    if name.endswith((".weight", ".bias")):
        return ()
    return (f"{name}.weight", *([f"{name.removesuffix('.scale')}.weight"] if name.endswith(".scale") else []))


def form_of(name: str) -> str:
    """A tensor's name with its module flat, every number and open place as #, the same for all blocks.

    >>> form_of("blocks.{i}.ffn.0.weight"), form_of("blocks_12_ffn_0.weight")
    ('blocks_#_ffn_#.weight', 'blocks_#_ffn_#.weight')
    """
    module, dot, leaf = name.rpartition(".")
    return re.sub(r"\{\w+\}|\d+", "#", flatten(module)) + dot + leaf


def _pair(kind: str, original: str, diffusers: list[str], shares: str = "1") -> Pair:
    how = kind if kind in ("swap", "swap-short", "turned") else "same"
    return Pair(original, tuple(diffusers), tuple(int(share) for share in shares.split(":")), how)


@dataclass(frozen=True)
class _Shape:
    """What names tell of a network: the greatest numbers, a UNet's layers for each block, and whether an up block has attentions."""

    most: int
    inner: int
    layers: int
    attended: Mapping[int, bool]

    @classmethod
    def of(cls, names: Collection[str], *, whole: bool, layers: int | None = None) -> _Shape:
        found = {int(text) for name in names for text in re.findall(r"(?<=[._])\d+(?=[._])", name) if len(text) < 4}
        most = max((number for number in found if number <= _MOST), default=0)
        layers = layers or (_layers(names) if whole else _LAYERS)
        inner = (int(text) for name in names for text in re.findall(r"transformer_blocks[._](\d{1,3})[._]", name))
        return cls(most, max(inner, default=0), layers, dict(_attended(names, layers, whole=whole)))

    def numbers(self, text: str) -> Iterator[dict[str, int]]:
        keys, n = set(re.findall(r"\{(\w+)\}", text)), self.layers
        ranges = {
            "b": range(min(self.most + 1, _BLOCKS)), "l": range(n + ("out" in keys)), "i": range(self.most + 1),
            "t": range(self.inner + 1), "u": range(1, 3), "e": range(_BLOCKS),
        }  # fmt: skip
        free = [key for key in ranges if key in keys]
        for values in product(*(ranges[key] for key in free)):
            yield _blocks(dict(zip(free, values, strict=True)), n)

    def told(self, numbers: Mapping[str, int]) -> bool:
        """An upsampler stands after the attentions of its block, if it has any, else in their place."""
        return "u" not in numbers or numbers["u"] == 1 + self.attended.get(numbers["b"], -9)


def _blocks(numbers: dict[str, int], layers: int) -> dict[str, int]:
    """With the numbers that a UNet's blocks have in one row: input 0 is conv_in, and each block ends with its down- or upsampler."""
    if "b" not in numbers:
        return numbers
    first, layer = numbers["b"] * (layers + 1), numbers.get("l", 0)
    return numbers | {"in": 1 + first + layer, "op": first + layers + 1, "out": first + layer, "up": first + layers}


def _layers(names: Collection[str]) -> int:
    """layers_per_block of a whole UNet, by its first block; of another network, anything."""
    theirs = [int(found[1]) + 1 for name in names if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", name))]
    own = [int(found[1]) - 1 for name in names if (found := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
    return max(theirs) if theirs else min(own) if own else _LAYERS


def _attended(names: Collection[str], layers: int, *, whole: bool) -> Iterator[tuple[int, bool]]:
    """Which up blocks have attentions, as far as the names tell; those with a fourth block are SD 1 and 2, whose first has none."""
    met = {int(found[1]) for name in names if (found := re.search(r"(?:^|[._])up_blocks[._](\d+)[._]attentions[._]", name))}
    met |= {
        int(found[1]) // (layers + 1)
        for name in names
        if (found := re.search(r"(?:^|[._])output_blocks[._](\d+)[._]1[._](?!conv[._])", name))
    }
    four = any(re.search(r"(?:^|[._])(?:up|down)_blocks[._]3[._]", name) for name in names)
    for block in range(_BLOCKS):
        if block in met or whole:
            yield block, block in met
        elif block or four:
            yield block, block > 0


@cache
def networks() -> tuple[Network, ...]:
    """The table's networks, in its order."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    marks: dict[str, dict[str, tuple[re.Pattern[str], ...]]] = {}
    sizes: dict[str, list[tuple[str, ...]]] = {}
    lines = (line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    for name, kind, *cells in lines:
        if kind == "mark":
            marks.setdefault(name, {})[cells[0]] = tuple(map(re.compile, cells[1].split(" ")))
        elif kind in ("sizes", "ratio"):
            sizes.setdefault(name, []).append((kind, *cells))
        else:
            rows.setdefault(name, []).append((kind, *cells))
    return tuple(Network(name, tuple(_inlined(rows[name], rows)), found, tuple(sizes.get(name, ()))) for name, found in marks.items())


def _inlined(own: list[tuple[str, ...]], every: Mapping[str, list[tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    """The rows with those of other keys in place of their names."""
    for kind, first, second, *more in own:
        if kind == "each":
            for inner, one, other, *rest in every[more[0]]:
                yield (inner, f"{first}.{one}", " ".join(f"{second}.{word}" for word in other.split(" ")), *rest)
        else:
            yield (kind, first, second, *more)


def recognised(names: Collection[str]) -> tuple[Network, str] | None:
    """The network that a model's tensors are those of, and which names they have."""
    found = ((network, network.side(names)) for network in networks())
    return next(((network, side) for network, side in found if side is not None), None)
