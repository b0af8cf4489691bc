"""cloneofsimo's `lora_diffusion`: modules counted instead of named, `unet:0:up`, with the classes they were looked for in.

    unet:INDEX:up (out, r, 1…)   unet:INDEX:down (r, in, *kernel)   text_encoder:INDEX:up …    ΔW = up·down
    <token> (dim)      a textual inversion, metadata `<token>`: `<embed>`; it changes no weight and is a passenger
    a list [up, down, up, down, …] in a `.pt`, of the UNet or, in `NAME.text_encoder.pt`, of the text encoder

Metadata: `unet` and `text_encoder`, JSON lists of classes; `unet:INDEX:rank`. There is no alpha. Read from `lora_diffusion/lora.py` of
cloneofsimo/lora (d84074b); spec/formats/cloneofsimo.md and `_walks` tell which module an index means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, ShapeError, UnsupportedError, raise_all
from loratools.formats._scale import exact_alpha
from loratools.formats._walks import DEFAULTS, ERAS, PARTS, known, stable_diffusion, walk
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Ref, Spec

NAME = "cloneofsimo"
MARKS = (":up", ":down")
_KEY = re.compile(r"(?P<part>[A-Za-z_]\w*):(?P<index>\d+):(?P<side>up|down)")
TOKEN = re.compile(r"<.+>")
EMBED = "<embed>"


def detect(container: Container) -> bool:
    """Whether its tensors are counted by part, index and side, or lie in a list."""
    return any(_KEY.fullmatch(key) for key in container.tensors) or _listed(container)


def _listed(container: Container) -> bool:
    """Whether the tensors are a pickled list's, which have numbers for names."""
    return bool(container.tensors) and list(container.tensors) == [str(place) for place in range(len(container.tensors))]


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in such a file: under Stable Diffusion's names where it changes all that one of its networks has, else under the
    file's own numbers, which a base's modules then give names.

    `alpha` of the options is the project's own, a factor of up·down itself, 1 where none is given. Raises FormatError for strays and
    half pairs, ShapeError for factors that do not meet, MatchError where the metadata say another rank, UnsupportedError for classes
    other than those of `_walks`.
    """
    options = options or ReadOptions()
    tensors = _from_list(container) if _listed(container) else dict(container.tensors)
    passengers = {key: ref for key, ref in tensors.items() if TOKEN.fullmatch(key)}
    try:
        pairs, faults = _pairs({key: ref for key, ref in tensors.items() if key not in passengers})
        parts: dict[str, dict[int, LowRank]] = {}
        for (part, index), pair in pairs.items():
            try:
                low = _low_rank(pair, 1.0 if options.alpha is None else options.alpha)
                _check_rank(container.metadata, f"{part}:{index}:rank", low.rank)
                parts.setdefault(part, {})[index] = low
            except LoratoolsError as error:
                faults.append(error.at(tensor=f"{part}:{index}:{next(iter(pair))}"))
        targets = {part: targets_of(container.metadata, part) for part in parts}
        faults += [fault for part in parts for fault in _gaps(part, {index for other, index in pairs if other == part})]
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    deltas = {f"{part}:{index}.weight": low for part, found in parts.items() for index, low in sorted(found.items())}
    counted = Counted(tuple(deltas), targets)
    named, era = _by_table(counted, deltas)
    counted = replace(counted, names=tuple(named))
    metadata: dict[str, Any] = {"safetensors": dict(container.metadata), NAME: {"order": era} if era else {}}
    return Adapter(
        named, metadata, passengers, container.path, NAME, container.files, notes=_notes(container), numbered=counted,
    )  # fmt: skip


def _from_list(container: Container) -> dict[str, Ref]:
    """The list's tensors under the keys that a safetensors file has for them."""
    part = "text_encoder" if container.path is not None and container.path.name.endswith(".text_encoder.pt") else "unet"
    return {f"{part}:{int(place) // 2}:{('up', 'down')[int(place) % 2]}": ref for place, ref in container.tensors.items()}


def _pairs(tensors: Mapping[str, Ref]) -> tuple[dict[tuple[str, int], dict[str, Ref]], list[LoratoolsError]]:
    pairs: dict[tuple[str, int], dict[str, Ref]] = {}
    faults: list[LoratoolsError] = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            faults.append(FormatError("not a key of this format", tensor=key, expected="PART:INDEX:up, PART:INDEX:down or <TOKEN>"))
        elif match["part"] not in PARTS:
            faults.append(UnsupportedError("a part whose modules are not known", tensor=key, expected=" or ".join(PARTS)))
        elif match["side"] in pairs.setdefault((match["part"], int(match["index"])), {}):
            faults.append(FormatError("the same tensor twice under two spellings", tensor=key))
        else:
            pairs[match["part"], int(match["index"])][match["side"]] = ref
    return pairs, faults


def _low_rank(pair: Mapping[str, Ref], scale: float) -> LowRank:
    for side in ("up", "down"):
        if side not in pair:
            raise FormatError(f"has no {side} beside it", remedy="the file is incomplete")
    up, down = pair["up"], pair["down"]
    a, b = down.spec.shape, up.spec.shape
    if len(a) not in (2, 4) or len(b) != len(a) or a[0] != b[1] or any(size != 1 for size in b[2:]):
        found, expected = f"down {list(a)}, up {list(b)}", "down [rank, in], up [out, rank], or a convolution's with up [out, rank, 1, 1]"
        remedy = "they are swapped" if len(a) == len(b) == 2 and a[1] == b[0] < min(a[0], b[1]) else None
        raise ShapeError("down and up do not meet", found=found, expected=expected, remedy=remedy)
    if a[0] > min(a[1], b[0]):  # the project's own layers refuse that
        found, expected = f"down {list(a)}, up {list(b)}", "down [rank, in], up [out, rank]"
        raise ShapeError("the rank is above in and out", found=found, expected=expected, remedy="they are swapped")
    layer = "conv" if len(a) == 4 else "linear"
    return LowRank(A=down, B=up.reshape(*b[:2]), alpha=exact_alpha(scale, a[0]), layer=layer)


def _check_rank(metadata: Mapping[str, str], key: str, rank: int) -> None:
    if metadata.get(key, str(rank)) != str(rank):
        raise MatchError("the rank is not the metadata's", found=rank, expected=metadata[key])


def targets_of(metadata: Mapping[str, str], part: str) -> tuple[frozenset[str], ...]:
    """The set of classes whose layers the part's modules are, or, where the file does not tell, those they may be."""
    if part not in metadata:
        return DEFAULTS[part]
    try:
        told = json.loads(metadata[part])
    except ValueError:
        told = None
    if not isinstance(told, list) or not told or not all(isinstance(name, str) for name in told):
        raise FormatError(f"metadata {part} is not a list of classes", found=metadata[part][:60])
    strange = [name for name in told if not known(name)]
    if strange:
        expected = ", ".join(sorted(frozenset().union(*DEFAULTS["unet"], *DEFAULTS["text_encoder"])))
        raise UnsupportedError(f"metadata {part}: which layers lie below a class is not known", found=strange[0], expected=expected)
    return (frozenset(told),)


def _gaps(part: str, found: set[int]) -> list[LoratoolsError]:
    lacking = sorted(set(range(max(found) + 1)) - found)
    fact, remedy = "modules are counted without gaps", "the file is incomplete"
    return [FormatError(fact, tensor=f"{part}:{index}:up", found="none", remedy=remedy) for index in lacking[:3]]


def _notes(container: Container) -> tuple[str, ...]:
    """A pickled list is one of up to three files."""
    if container.path is None or not _listed(container):
        return ()
    stem = container.path.name.removesuffix(".pt").removesuffix(".text_encoder")
    others = [container.path.with_name(f"{stem}{end}.pt") for end in ("", ".text_encoder", ".ti")]
    found = [other.name for other in others if other.name != container.path.name and other.is_file()]
    return (f"{', '.join(found)} beside it belongs to the same run, and is read as an adapter of its own",) if found else ()


# -- which module an index means


@dataclass(frozen=True)
class Counted:
    """The deltas' own names, in the file's order, and the classes that each part's modules were looked for in."""

    own: tuple[str, ...]
    targets: Mapping[str, tuple[frozenset[str], ...]]
    names: tuple[str, ...] = ()  # what the deltas are called, where a table has named them

    def __call__(self, deltas: Mapping[str, Delta], base: Mapping[str, Spec]) -> Mapping[str, Delta]:
        """The deltas under a base's names, part by part.

        Raises MatchError where the base has another number of modules, ShapeError where no order fits, AmbiguousError where two do.
        """
        called = dict(zip(self.own, self.names or self.own, strict=True))
        names: dict[str, str] = {}
        for part in self.targets:
            low = {own: delta for own in self.own if own.startswith(f"{part}:") and isinstance(delta := deltas.get(called[own]), LowRank)}
            words = [own for own in self.own if own.startswith(f"{part}:")]
            within = {name.removeprefix(f"{part}."): spec for name, spec in base.items() if name.startswith(f"{part}.")}
            prefix, specs = (f"{part}.", within) if within else ("", base)
            if len(low) == len(words) and any(walk(specs, set(targets), ERAS[0]) for targets in self.targets[part]):
                names |= {called[own]: prefix + name for own, name in zip(words, self._met(part, list(low.values()), specs), strict=True)}
        return {names.get(name, name): delta for name, delta in deltas.items()}

    def _met(self, part: str, lows: list[LowRank], base: Mapping[str, Spec]) -> list[str]:
        walks = self._walks(part, base)
        counts = [len(names) for names in walks.values()]
        fitting = {tuple(names) for names in walks.values() if _fit_all(lows, names, base)}
        if len(fitting) == 1:
            return list(next(iter(fitting)))
        first = f"{part}:0:up"
        if len(fitting) > 1:
            raise AmbiguousError("its modules fit the base's in two orders", tensor=first, found=" and ".join(ERAS))
        if len(lows) not in counts:
            expected = f"{' or '.join(map(str, dict.fromkeys(counts)))} modules, as the base has"
            raise MatchError("another number of modules than the base's", tensor=first, found=len(lows), expected=expected)
        names = next(names for names in walks.values() if len(names) == len(lows))
        index = next(index for index, low in enumerate(lows) if not _fits(low, base[names[index]]))
        found, expected = list(lows[index].shape()), f"{list(base[names[index]].shape)} of {names[index]}"
        raise ShapeError("does not fit the module of that number", tensor=f"{part}:{index}:up", found=found, expected=expected)

    def _walks(self, part: str, base: Mapping[str, Spec]) -> dict[tuple[frozenset[str], str], list[str]]:
        return {(targets, era): walk(base, targets, era) for targets in self.targets[part] for era in ERAS}

    def order(self, part: str, lows: list[LowRank], base: Mapping[str, Spec]) -> tuple[list[str], str] | None:
        """The names of all modules in the order that fits, and that order; None where none does."""
        for (_, era), names in self._walks(part, base).items():
            if _fit_all(lows, names, base):
                return names, era
        return None


def _fit_all(lows: Sequence[LowRank], names: Sequence[str], base: Mapping[str, Spec]) -> bool:
    return len(names) == len(lows) and all(_fits(low, base[name]) for low, name in zip(lows, names, strict=True))


def _fits(low: LowRank, weight: Spec) -> bool:
    def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[:2] if set(shape[2:]) <= {1} else shape

    return squeezed(low.shape()) == squeezed(weight.shape)


def _by_table(counted: Counted, deltas: Mapping[str, LowRank]) -> tuple[dict[str, LowRank], str | None]:
    """The deltas under Stable Diffusion's names where its modules are these in number and shape; and the order they are counted in."""
    named: dict[str, LowRank] = {}
    eras: list[str] = []
    for part in counted.targets:
        lows = {name: low for name, low in deltas.items() if name.startswith(f"{part}:")}
        tables = (stable_diffusion(part, version) for version in (1, 2))
        found = next((order for table in tables if (order := counted.order(part, list(lows.values()), table))), None)
        names = [f"{part}.{name}" for name in found[0]] if found else list(lows)
        eras += [found[1]] if found and part == "unet" else []
        named |= dict(zip(names, lows.values(), strict=True))
    return named, eras[0] if eras else None
