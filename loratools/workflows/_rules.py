"""The predicates by which a target's rules find what a runtime loses: a small fixed set, each a function of the adapter's facts.

A predicate yields a `Hit` for each place; its keywords are the settings that a rule's `with` may give. One predicate more is one
function more in PREDICATES.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError

SAME = 2.0**-40  # two scalings that differ by less are one, computed in two ways


@dataclass(frozen=True)
class Hit:
    """A place that a rule found: a tensor, or a field of the config; the deltas it concerns; what was found there."""

    place: str
    names: tuple[str, ...]
    found: str | None = None


@dataclass(frozen=True)
class Subject:
    """An adapter as the rules see it: its deltas, and, of one that was read from a file, its raw config and keys.

    `heads` are the tensors of output heads that a base ties to its embedding, `tied` the embeddings.
    """

    adapter: Adapter
    reads: tuple[str, ...]
    config: Mapping[str, Any] | None = None
    keys: Sequence[str] = ()
    heads: frozenset[str] = field(default_factory=frozenset)
    tied: frozenset[str] = field(default_factory=frozenset)

    @cached_property
    def parts(self) -> list[tuple[str, Delta]]:
        """Every delta under its name; a saved tensor and what comes after it are two."""
        return [(name, part) for name, delta in self.adapter.items() for part in parts_of(delta)]

    @cached_property
    def lows(self) -> list[tuple[str, LowRank]]:
        """Every LoRA, a DoRA's direction among them."""
        inner = [(name, part.direction if isinstance(part, DoRA) else part) for name, part in self.parts]
        return [(name, part) for name, part in inner if isinstance(part, LowRank)]

    @property
    def every(self) -> tuple[str, ...]:
        return tuple(self.adapter)


def parts_of(delta: Delta) -> Iterator[Delta]:
    """What a rule calls a delta: what comes after a saved tensor by itself, without what a base would settle."""
    if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
        yield delta.first
        yield from parts_of(delta.then)
    else:
        yield delta.delta if isinstance(delta, Unsettled | WherePresent) else delta


def format_(subject: Subject) -> Iterator[Hit]:
    """The adapter is in none of the formats that the target reads."""
    found = subject.adapter.format
    if found is not None and found not in subject.reads:
        yield Hit("the whole adapter", subject.every, f"a file in the format {found}")


def kind(
    subject: Subject, *, kinds: Sequence[str] = (), but: Sequence[str] = (), leaf: str | None = None, vector: bool | None = None
) -> Iterator[Hit]:
    """Deltas of one of `kinds`, or of none of `but`; on tensors whose name ends in `leaf`; on vectors, or on all else."""
    for name, delta in subject.parts:
        chosen = delta.kind in kinds if kinds else delta.kind not in but
        if chosen and (leaf is None or name.rpartition(".")[2] == leaf) and (vector is None or vector == _is_vector(name, delta)):
            yield Hit(name, (name,), delta.kind)


def _is_vector(name: str, delta: Delta) -> bool:
    return name.endswith(".bias") or (isinstance(delta, Additive) and len(delta.shape()) < 2)


def layer(subject: Subject, *, layers: Sequence[str]) -> Iterator[Hit]:
    """LoRA of layers of one of these sorts: conv, embedding, transposed."""
    for name, low in subject.lows:
        sort = "conv" if len(low.A.spec.shape) > 2 else low.layer
        if sort in layers:
            yield Hit(name, (name,), f"LoRA of {'a convolution' if sort == 'conv' else f'an {sort}' if sort[0] in 'aeiou' else sort}")


def axis(subject: Subject, *, axis: str, linear: bool = False) -> Iterator[Hit]:
    """DoRA whose magnitudes lie along this axis of the weight as it is stored; with `linear`, only where that is (out, in)."""
    for name, delta in subject.parts:
        turned = isinstance(delta, DoRA) and isinstance(delta.direction, LowRank) and delta.direction.layer in ("embedding", "transposed")
        if isinstance(delta, DoRA) and delta.axis == axis and not (linear and turned):
            yield Hit(name, (name,), f"magnitudes along {axis}")


def name(subject: Subject, *, globs: Sequence[str]) -> Iterator[Hit]:
    """Deltas of tensors of these names."""
    for one in subject.adapter:
        if any(fnmatch.fnmatchcase(one, glob) for glob in globs):
            yield Hit(one, (one,))


def rank(subject: Subject, *, above: int | None = None, above_config: bool = False, uniform: bool = False) -> Iterator[Hit]:
    """LoRA of a rank above a number, or above the config's `r`; or, where all must be alike, of another than most have."""
    ranks = [low.rank for _, low in subject.lows]
    limit = above
    if above_config:
        stated = (subject.config or {}).get("r")
        limit = stated if type(stated) is int else Counter(ranks).most_common(1)[0][0] if ranks else None
    usual = Counter(ranks).most_common(1)[0][0] if ranks else 0
    for name, low in subject.lows:
        if limit is not None and low.rank > limit:
            yield Hit(name, (name,), f"rank {low.rank}, above {limit}")
        elif uniform and low.rank != usual:
            yield Hit(name, (name,), f"rank {low.rank}, the others {usual}")


def scale(subject: Subject, *, per: str = "config", rslora: bool = False) -> Iterator[Hit]:
    """LoRA of another scaling than the target computes: alpha / r of the config, alpha / the tensor's own rank, or 1.

    `per` is "config", "tensor" or "one"; `rslora` whether the target honours that flag. Without a config, another than most have.
    """
    taken = _taken(subject, per, rslora)
    for name, low in subject.lows:
        used = taken(low)
        if abs(used - low.scaling) > SAME * abs(low.scaling):
            yield Hit(name, (name,), f"scaled by {used:.4g} instead of {low.scaling:.4g}")


def _taken(subject: Subject, per: str, rslora: bool) -> Callable[[LowRank], float]:
    """The scaling that the target multiplies a LoRA by."""
    if per == "one":
        return lambda low: 1.0
    config = subject.config if subject.config is not None and "peft_type" in subject.config else None
    if config is not None:
        alpha, r = (8 if config.get(word) is None else config[word] for word in ("lora_alpha", "r"))  # peft's own defaults
        flagged = rslora and bool(config.get("use_rslora"))
        return lambda low: alpha / (math.sqrt(r) if flagged else r if per == "config" else low.rank)
    usual = Counter(round(low.scaling * (low.rank if per == "tensor" else 1), 9) for _, low in subject.lows).most_common(1)

    def used(low: LowRank) -> float:
        if low.rslora and not rslora:
            return low.alpha / low.rank
        stated = low.scaling * (low.rank if per == "tensor" else 1)
        return low.scaling if round(stated, 9) == usual[0][0] else usual[0][0] / (low.rank if per == "tensor" else 1)

    return used


def config(
    subject: Subject, *, given: Sequence[str] = (), missing: Sequence[str] = (), like: Mapping[str, str] | None = None,
    kinds: Sequence[str] = (),
) -> Iterator[Hit]:  # fmt: skip
    """A field of the config that is given, or missing; entries of a pattern that repeat the field `like` names count for nothing.

    The hit concerns the deltas of `kinds`, else all.
    """
    if subject.config is None:
        return
    concerned = tuple(dict.fromkeys(name for name, delta in subject.parts if delta.kind in kinds)) if kinds else subject.every
    for word in given:
        value = subject.config.get(word)
        if isinstance(value, Mapping) and like and word in like:
            value = {key: item for key, item in value.items() if item != subject.config.get(like[word])}
        if value:
            yield Hit(f"adapter_config.json: {word}", concerned, _short(value))
    for word in missing:
        if subject.config.get(word) is None:
            yield Hit(f"adapter_config.json: {word}", concerned, "missing")


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, Mapping | list | tuple) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def keys(subject: Subject, *, never: str | None = None, always: str | None = None) -> Iterator[Hit]:
    """Keys of the file that a pattern finds, or that it does not find where it always should."""
    for key in subject.keys:
        if (never is not None and re.search(never, key)) or (always is not None and not re.search(always, key)):
            owners = tuple(name for name in subject.adapter if name.rpartition(".")[0] and name.rpartition(".")[0] in key)
            yield Hit(key, owners)


def dtype(subject: Subject, *, takes: Sequence[str]) -> Iterator[Hit]:
    """Tensors of another dtype than these."""
    for name, delta in subject.adapter.items():
        other = sorted({ref.spec.dtype for ref in delta.refs().values()} - set(takes))
        if other:
            yield Hit(name, (name,), other[0])


def passengers(subject: Subject) -> Iterator[Hit]:
    """Tensors that are no weight edit: textual inversions and their like."""
    for name in subject.adapter.passengers:
        yield Hit(name, (), "no change of a weight")


def tied(subject: Subject, *, side: str) -> Iterator[Hit]:
    """LoRA on the `head`, or on the `embedding`, where the base has one tensor for both; only a base tells."""
    for name, _ in subject.lows:
        if name in (subject.heads if side == "head" else subject.tied):
            yield Hit(name, (name,), f"tied to the {'embedding' if side == 'head' else 'head'}")


PREDICATES: Mapping[str, Callable[..., Iterator[Hit]]] = {
    "format": format_, "kind": kind, "layer": layer, "axis": axis, "name": name, "rank": rank, "scale": scale, "config": config,
    "keys": keys, "dtype": dtype, "passengers": passengers, "tied": tied,
}  # fmt: skip


def hits(when: str, settings: Mapping[str, Any], subject: Subject) -> list[Hit]:
    """What a rule finds. Raises FormatError for a predicate, or a setting of one, that there is not."""
    if when not in PREDICATES:
        raise FormatError("no such predicate", found=when, expected=" or ".join(PREDICATES))
    try:
        return list(PREDICATES[when](subject, **settings))
    except TypeError as error:
        raise FormatError(f"settings of the predicate {when}: {error}", found=", ".join(settings)) from None
