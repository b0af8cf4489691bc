"""The runtimes that load adapters, one TOML file each: what they read, and the rules by which they refuse, ignore or mis-scale.

    title = "vLLM"                      what a person calls it
    format = "peft"                     the format that `fit` writes
    reads = ["peft"]                    the formats it loads
    otherwise = ["kohya"]               formats that `fit` writes where the names are none of the first

    [fit]                               what all of an adapter has in common once it fits
    uniform_rank = true                 one rank, the smaller modules padded with zeros
    one_scale = true                    one scaling, without rsLoRA's flag
    max_rank = 512                      no greater rank

    [sources.NAME]                      where a rule was read: project, version (a release or a commit), file, url

    [[rules]]
    id = "dora"
    loses = "refuse"                    or "ignore", "mis-scale"; "note" tells a person something and loses nothing
    when = "kind"                       a predicate of `workflows._rules`, and below its own settings
    with = { kinds = ["dora"] }
    reason = "…"                        one sentence
    source = "NAME"
    where = "PEFTHelper._scaling"       the function or method of that file
    fit = "lora"                        what `fit` does about it, one of FITS
    remedy = "run it in …"              what helps where `fit` does nothing, if merging it into the base does not
    formats = ["peft"]                  only of adapters read from these, or: `unless = […]`

A target more is one file more.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

from loratools.errors import FormatError, OptionError

LOSSES = ("refuse", "ignore", "mis-scale", "note")
# lora: made LoRA; bake: one scaling for all; rank: other ranks; apart: a file of its own; beside: LoRA of zeros where it lacks;
# write: the writing does it; none: not at all
FITS = ("lora", "bake", "rank", "apart", "beside", "write", "none")


@dataclass(frozen=True)
class Source:
    """Where a rule was read; `where` is the function of the file."""

    project: str
    version: str
    file: str
    url: str
    where: str = ""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What becomes of some of an adapter in a runtime; `when` names the predicate that finds it, `settings` are that one's."""

    id: str
    loses: str
    when: str
    reason: str
    source: Source
    fit: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)
    remedy: str | None = None
    formats: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()

    def concerns(self, format: str | None) -> bool:
        """Whether it is about adapters read from that format."""
        return (not self.formats or format in self.formats) and format not in self.unless


@dataclass(frozen=True, kw_only=True)
class Target:
    """A runtime: its formats, its rules, and what `fit` makes all of an adapter have in common."""

    name: str
    title: str
    format: str
    reads: tuple[str, ...]
    rules: tuple[Rule, ...]
    otherwise: tuple[str, ...] = ()
    uniform_rank: bool = False
    one_scale: bool = False
    max_rank: int | None = None


def names() -> tuple[str, ...]:
    """The targets there are, in the order of their names."""
    return tuple(sorted(file.name.removesuffix(".toml") for file in resources.files(__name__).iterdir() if file.name.endswith(".toml")))


@cache
def target_of(name: str) -> Target:
    """The target of that name. Raises OptionError where there is none."""
    if name not in names():
        raise OptionError("unknown --for", found=name, expected=" or ".join(names()))
    return parse(name, resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Target:
    """A target from its TOML. Raises FormatError for a word that is none, for one that is missing, and for two rules of one id."""
    file = f"{name}.toml"
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"no TOML: {error}", file=file) from None
    _words(table, file, {"title", "format", "reads"}, {"otherwise", "fit", "sources", "rules"})
    _words(table.get("fit", {}), file, set(), {"uniform_rank", "one_scale", "max_rank"})
    sources = {key: _source(f"{file}: sources.{key}", value) for key, value in table.get("sources", {}).items()}
    rules = tuple(_rule(f"{file}: rules[{place}]", value, sources) for place, value in enumerate(table.get("rules", ())))
    ids = [rule.id for rule in rules]
    if len(set(ids)) < len(ids):
        raise FormatError("two rules of one id", file=file, found=next(one for one in ids if ids.count(one) > 1))
    common = table.get("fit", {})
    reads, otherwise = tuple(table["reads"]), tuple(table.get("otherwise", ()))
    return Target(name=name, title=table["title"], format=table["format"], reads=reads, otherwise=otherwise, rules=rules, **common)


def _source(place: str, table: Mapping[str, Any]) -> Source:
    _words(table, place, {"project", "version", "file", "url"}, set())
    return Source(**table)


def _rule(place: str, table: Mapping[str, Any], sources: Mapping[str, Source]) -> Rule:
    _words(table, place, {"id", "loses", "when", "reason", "source", "where"}, {"fit", "with", "remedy", "formats", "unless"})
    for word, allowed in (("loses", LOSSES), ("fit", FITS), ("source", tuple(sources))):
        if table.get(word, allowed[0]) not in allowed:
            raise FormatError(word, file=place, found=table[word], expected=" or ".join(allowed))
    own = {word: table[word] for word in ("id", "loses", "when", "reason")}
    return Rule(
        **own, source=replace(sources[table["source"]], where=table["where"]), fit=table.get("fit", "none"), settings=table.get("with", {}),
        remedy=table.get("remedy"), formats=tuple(table.get("formats", ())), unless=tuple(table.get("unless", ())),
    )  # fmt: skip


def _words(table: Mapping[str, Any], place: str, needed: set[str], more: set[str]) -> None:
    lacking, strange = sorted(needed - set(table)), sorted(set(table) - needed - more)
    if lacking or strange:
        fact = "lacks a word" if lacking else "a word that is none"
        expected = ", ".join(sorted(needed | more))
        raise FormatError(fact, file=place, found=None if lacking else strange[0], expected=lacking[0] if lacking else expected)
