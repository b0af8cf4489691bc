"""What a target's rules find in an adapter, as findings with their weight in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.formats.base import Container, read_options
from loratools.formats.opening import open_container
from loratools.formats.reading import Reading
from loratools.ops._algebra import loaded
from loratools.ops._base import Base
from loratools.workflows._rules import hits
from loratools.workflows._subject import Subject
from loratools.workflows._weights import weights
from loratools.workflows.targets import Rule, Source, Target, target_of


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a target loses of an adapter: `kind` is refuse, ignore or mis-scale, `share` the part of ‖ΔW‖² it is.

    `tensor` is a tensor, or a field of the config; a `share` of None has its `unmeasured` reason. `remedy` is what helps where `fit`
    does not, None for merging it into the base.
    """

    target: str
    rule: str
    kind: str
    tensor: str
    reason: str
    found: str | None
    share: float | None
    unmeasured: str | None
    fit: str
    source: Source
    remedy: str | None = None


def findings(adapter: str | Path | Adapter, target: str, *, base: str | Path | Base | None = None, **reading: Any) -> list[Finding]:
    """All that `target` would lose of an adapter, in the order of its rules. Raises what reading the adapter and the base raise."""
    return look(adapter, target, base, reading).findings


@dataclass(frozen=True)
class Look:
    """An adapter looked at for a target."""

    target: Target
    adapter: Adapter
    findings: list[Finding]
    notes: list[str]
    unmeasured: list[str]


def look(adapter: str | Path | Adapter, target: str, base: str | Path | Base | None, reading: Mapping[str, Any]) -> Look:
    """The adapter, under the base's names if there is one, and all that the target's rules find in it."""
    chosen = target_of(target)
    options = read_options(reading)
    given = loaded(adapter, options)
    words: Reading = {"embedding": options.embeddings, "transposed": options.transposed}
    on = base if isinstance(base, Base) or base is None else Base(base, words)
    settled = given if on is None else on.resolve(given)
    struck = struck_of(given, settled, chosen, on)
    lost = [one for one in struck if one.rule.loses != "note"]
    weighed = weights(settled, on) if lost else {}
    unmeasured = [name for name, weight in weighed.items() if isinstance(weight, str)]
    return Look(chosen, settled, _findings(lost, chosen, weighed), _notes(struck), unmeasured)


def subject_of(adapter: Adapter, target: Target, base: Base | None) -> Subject:
    """An adapter with what its own file says; one that was made in memory has no config and no keys."""
    container = None if adapter.path is None or adapter.format is None else open_container(adapter.path)
    return subject_in(container, adapter, target, base)


def subject_in(container: Container | None, adapter: Adapter, target: Target, base: Base | None = None) -> Subject:
    """An adapter beside the container that it was read from."""
    pairs = base.family.ties(base.checkpoint) if base is not None else []
    heads, tied = frozenset(head for _, head in pairs), frozenset(embedding for embedding, _ in pairs)
    config, keys = (None, ()) if container is None else (container.config, tuple(container.tensors))
    return Subject(adapter, target.reads, config, keys, heads=heads, tied=tied, base=base)


@dataclass(frozen=True)
class Strike:
    """A rule and one place that it found."""

    rule: Rule
    place: str
    names: tuple[str, ...]
    found: str | None
    lacking: tuple[str, ...] = ()


def strikes(subject: Subject, target: Target) -> list[Strike]:
    """What the rules of a target find, in their order; a place is told once for each kind of loss and remedy."""
    struck: list[Strike] = []
    known: set[tuple[str, str]] = set()
    for rule in target.rules:
        if not rule.concerns(subject.adapter.format):
            continue
        for hit in hits(rule.when, rule.settings, subject):
            if (hit.place, rule.id) not in known:
                known.add((hit.place, rule.id))
                struck.append(Strike(rule, hit.place, hit.names, hit.found, hit.lacking))
    return struck


def struck_of(given: Adapter, settled: Adapter, target: Target, base: Base | None) -> list[Strike]:
    """What rules find in an adapter under the base's names, and what those that find nothing there find in the file as it is."""
    struck = strikes(subject_of(settled, target, base), target)
    if settled is given:
        return struck
    known = {one.rule.id for one in struck}
    own = [one for one in strikes(subject_of(given, target, base), target) if one.rule.id not in known]
    order = {rule.id: place for place, rule in enumerate(target.rules)}
    return sorted(struck + own, key=lambda one: order[one.rule.id])


def lost(adapter: Adapter, target: Target, base: Base | None) -> list[Strike]:
    """What a target would lose of an adapter, told of its deltas and of the file it was read from."""
    return [one for one in strikes(subject_of(adapter, target, base), target) if one.rule.loses != "note"]


def _findings(lost: Iterable[Strike], target: Target, weighed: Mapping[str, float | str]) -> list[Finding]:
    total = math.fsum(weight**2 for weight in weighed.values() if isinstance(weight, float))
    made = []
    for one in lost:
        if one.rule.loses == "ignore" and one.names and all(weighed.get(name) == 0.0 for name in one.names) and total:
            continue  # a copy of the base's own, of which nothing is lost
        whole = bool(one.names) and set(one.names) == set(weighed)
        share, why = (1.0, None) if whole else _share([weighed.get(name, _ELSEWHERE) for name in one.names], total)
        made.append(
            Finding(
                target=target.name, rule=one.rule.id, kind=one.rule.loses, tensor=one.place, reason=one.rule.reason, found=one.found,
                share=share, unmeasured=why, fit=one.rule.fit, source=one.rule.source, remedy=one.rule.remedy,
            )
        )  # fmt: skip
    return made


_ELSEWHERE = "the base has it under other names, which are told by themselves"


def _share(known: list[float | str], total: float) -> tuple[float | None, str | None]:
    """The part of ‖ΔW‖² of all that was measured, or why there is none to tell."""
    unknown = next((weight for weight in known if isinstance(weight, str)), None)
    if unknown is not None:
        return None, unknown
    if not known:
        return None, "it is no change of a weight"
    squares = math.fsum(weight**2 for weight in known if isinstance(weight, float))
    return (min(1.0, squares / total), None) if total else (None, "ΔW is zero")


def _notes(struck: Iterable[Strike]) -> list[str]:
    noted = {one.rule.id: one for one in reversed(list(struck)) if one.rule.loses == "note"}
    return [f"{one.rule.reason} ({one.place}{f': {one.found}' if one.found else ''})" for one in reversed(noted.values())]
