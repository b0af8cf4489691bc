"""The predicates by which a target's rules find what a runtime loses: a small fixed set, each a function of the adapter's facts.

A predicate yields a `Hit` for each place; its keywords are the settings that a rule's `with` may give. Here are those that look at
deltas; `_naming.py` has those of names, `_stated.py` those of the file. One predicate more is one function more in PREDICATES.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError
from loratools.formats.peft_encode import encode
from loratools.formats.peft_method_encode import row_for
from loratools.workflows._naming import joined, name, network
from loratools.workflows._stated import config, keys
from loratools.workflows._subject import WHOLE, Hit, Subject

SAME = 2.0**-40  # two scalings that differ by less are one, computed in two ways


def format_(subject: Subject) -> Iterator[Hit]:
    """The adapter is in none of the formats that the target reads."""
    found = subject.adapter.format
    if found is not None and found not in subject.reads:
        yield Hit(WHOLE, subject.every, f"a file in the format {found}")


def kind(
    subject: Subject, *, kinds: Sequence[str] = (), but: Sequence[str] = (), at: str | None = None, off: str | None = None,
    vector: bool | None = None, types: Sequence[str] = (), alone: bool = False,
) -> Iterator[Hit]:  # fmt: skip
    """Deltas of one of `kinds`, or of none of `but`; on tensors whose names a pattern finds, or does not; on vectors, or on all else.

    With `types`, only where there is a base and its model_type is none of these; `alone`, only where there is no base.
    """
    if (alone and subject.base is not None) or (types and (subject.base is None or set(types) & set(subject.base.family.types))):
        return
    for tensor, delta in subject.parts:
        chosen = delta.kind in kinds if kinds else delta.kind not in but
        placed = (at is None or re.search(at, tensor)) and (off is None or not re.search(off, tensor))
        if chosen and placed and (vector is None or vector == _is_vector(tensor, delta)):
            yield Hit(tensor, (tensor,), delta.kind)


def _is_vector(tensor: str, delta: Delta) -> bool:
    return tensor.endswith(".bias") or (isinstance(delta, Full) and len(delta.shape()) < 2)


def method(subject: Subject, *, but: Sequence[str]) -> Iterator[Hit]:
    """Deltas of none of these kinds, unless all the adapter's are of one kind that is a method of peft's own."""
    own = {delta.kind for _, delta in subject.parts if delta.kind != "replacement"}
    if len(own) != 1 or not _written(subject.adapter):
        yield from kind(subject, but=but, vector=False)


def _written(adapter: Adapter) -> bool:
    """Whether peft can say an adapter of one kind; under flat names, which need a base first, whether it has such a method."""
    if adapter.flat:
        return row_for(adapter) is not None
    try:
        encode(adapter)
    except LoratoolsError:
        return False
    return True


def layer(subject: Subject, *, layers: Sequence[str], at: str | None = None) -> Iterator[Hit]:
    """LoRA of layers of one of these sorts: conv, embedding, transposed; or on tensors whose names a pattern finds."""
    for tensor, low in subject.lows:
        sort = "conv" if len(low.A.spec.shape) > 2 else low.layer
        if sort in layers and (at is None or re.search(at, tensor)):
            yield Hit(tensor, (tensor,), f"LoRA of {_SORTS.get(sort, sort)}")


_SORTS = {"conv": "a convolution", "embedding": "an embedding", "transposed": "a weight stored (in, out)"}


def axis(subject: Subject, *, axis: str, linear: bool = False) -> Iterator[Hit]:
    """DoRA whose magnitudes lie along this axis of the weight as it is stored; with `linear`, only where that is (out, in)."""
    for tensor, delta in subject.parts:
        turned = isinstance(delta, DoRA) and isinstance(delta.direction, LowRank) and delta.direction.layer in ("embedding", "transposed")
        if isinstance(delta, DoRA) and delta.axis == axis and not (linear and turned):
            yield Hit(tensor, (tensor,), f"magnitudes along {axis}")


def mixed(subject: Subject, *, parts: Sequence[str] = ()) -> Iterator[Hit]:
    """DoRA beside plain LoRA, where one flag holds for all of the adapter, or for each of these parts of it."""
    plain = {_part(tensor, parts) for tensor, delta in subject.parts if isinstance(delta, LowRank)}
    for tensor, delta in subject.parts:
        if isinstance(delta, DoRA) and _part(tensor, parts) in plain:
            yield Hit(tensor, (tensor,), "dora beside lora")


def _part(tensor: str, parts: Sequence[str]) -> str:
    first = tensor.partition(".")[0]
    return first if first in parts else ""


def rank(subject: Subject, *, above: int | None = None, above_config: bool = False, uniform: bool = False) -> Iterator[Hit]:
    """LoRA of a rank above a number, or above the config's `r`; or, where all must be alike, of another than the config's, or most's."""
    ranks = [low.rank for _, low in subject.lows]
    stated = (subject.config or {}).get("r")
    usual = stated if type(stated) is int else Counter(ranks).most_common(1)[0][0] if ranks else 0
    limit = usual if above_config else above
    for tensor, low in subject.lows:
        if limit is not None and low.rank > limit:
            yield Hit(tensor, (tensor,), f"rank {low.rank}, above {limit}")
        elif uniform and low.rank != usual:
            yield Hit(tensor, (tensor,), f"rank {low.rank}, {'the config says' if usual == stated else 'the others'} {usual}")


def scale(subject: Subject, *, per: str = "config", rslora: bool = False) -> Iterator[Hit]:
    """LoRA of another scaling than the target computes: alpha / r of the config, alpha / the tensor's own rank, or 1.

    `per` is "config", "tensor" or "one"; `rslora` whether the target honours that flag. Without a config, another than most have.
    """
    taken = _taken(subject, per, rslora)
    for tensor, low in subject.lows:
        used = taken(low)
        if abs(used - low.scaling) > SAME * abs(low.scaling):
            yield Hit(tensor, (tensor,), f"scaled by {used:.4g} instead of {low.scaling:.4g}")


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


def zero(subject: Subject) -> Iterator[Hit]:
    """LoRA of a scaling of 0, which some runtimes take for one that is not given."""
    for tensor, low in subject.lows:
        if low.scaling == 0:
            yield Hit(tensor, (tensor,), "scaled by 1 instead of 0")


def dtype(subject: Subject, *, takes: Sequence[str]) -> Iterator[Hit]:
    """Tensors of another dtype than these."""
    for tensor, delta in subject.adapter.items():
        other = sorted({ref.spec.dtype for ref in delta.refs().values()} - set(takes))
        if other:
            yield Hit(tensor, (tensor,), other[0])


def passengers(subject: Subject) -> Iterator[Hit]:
    """Tensors that are no weight edit: textual inversions and their like."""
    for tensor in subject.adapter.passengers:
        yield Hit(tensor, (), "no change of a weight")


def tied(subject: Subject, *, side: str) -> Iterator[Hit]:
    """LoRA on the `head`, or on the `embedding`, where the base has one tensor for both; only a base tells."""
    for tensor, _ in subject.lows:
        if tensor in (subject.heads if side == "head" else subject.tied):
            yield Hit(tensor, (tensor,), f"tied to the {'embedding' if side == 'head' else 'head'}")


PREDICATES: Mapping[str, Callable[..., Iterator[Hit]]] = {
    "format": format_, "kind": kind, "method": method, "layer": layer, "axis": axis, "mixed": mixed, "rank": rank, "scale": scale,
    "zero": zero, "dtype": dtype, "passengers": passengers, "tied": tied, "name": name, "network": network, "joined": joined,
    "config": config, "keys": keys,
}  # fmt: skip


def hits(when: str, settings: Mapping[str, Any], subject: Subject) -> list[Hit]:
    """What a rule finds. Raises FormatError for a predicate, or a setting of one, that there is not."""
    if when not in PREDICATES:
        raise FormatError("no such predicate", found=when, expected=" or ".join(PREDICATES))
    try:
        return list(PREDICATES[when](subject, **settings))
    except TypeError as error:
        raise FormatError(f"settings of the predicate {when}: {error}", found=", ".join(settings)) from None
