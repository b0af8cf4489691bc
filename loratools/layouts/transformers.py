"""transformers' names in memory and in files: its own table, as `transformers-5.23.tsv` beside this file.

A model's rules are those of its class, else of its type; a class that is made of parts with rules of their own has a row that says where
they are. `tests/layouts/make_table.py` writes the file, and its tests hold it against the installed transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from loratools.families import Families, Family
from loratools.layouts.rules import Fusion, Group, Layout, Layouts, Other, Rename, Rule, Scope

VERSION = "5.23"
_TABLE = Path(__file__).parent / f"transformers-{VERSION}.tsv"
_OLD = "legacy"  # rules of every model; alignment.py has them


class Part(NamedTuple):
    """The rules of a key on the tensors below a path, of all tensors if None."""

    key: str
    path: str | None


class Table(NamedTuple):
    """Rows of rules by class or type, and of models that are made of parts, each with the prefix of its base model."""

    rules: Mapping[str, tuple[tuple[str, ...], ...]]
    models: Mapping[str, tuple[str, tuple[Part, ...]]]


@cache
def table() -> Table:
    """The file, its rows not yet rules."""
    rules: dict[str, tuple[tuple[str, ...], ...]] = {}
    models: dict[str, tuple[str, tuple[Part, ...]]] = {}
    same: dict[str, str] = {}
    for line in _TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        key, kind, *cells = line.split("\t")
        if kind == "model":
            parts = tuple(Part(name, path if at else None) for name, at, path in (word.partition("@") for word in cells[1].split()))
            models[key] = cells[0].removeprefix("-"), parts
        elif kind == "same":
            same[key] = cells[0]
        else:
            rules[key] = (*rules.get(key, ()), (kind, *cells))
    return Table({**rules, **{key: rules[other] for key, other in same.items()}}, models)


def layout_of(config: Mapping[str, Any], within: str = "") -> Layout | None:
    """The layout of the model that a config.json describes, or None for one whose names are the same in memory and in files."""
    found = table()
    made = [name for name in config.get("architectures") or [] if isinstance(name, str)]
    kind = str(config.get("model_type"))
    name = next((name for name in made if name in found.models or name in found.rules), kind)
    prefix, parts = found.models.get(name, ("", (Part(name, None),) if name in found.rules else ()))
    known = {part.key for part in parts}
    inner = [str(value.get("model_type")) for value in config.values() if isinstance(value, Mapping)]
    parts += tuple(Part(kind, None) for kind in dict.fromkeys(inner) if kind in found.rules and kind not in known)
    return Layout(kind, rules_of(prefix, parts), within) if parts else None


def layouts_of(family: Family) -> Layouts | None:
    """The layouts of a checkpoint's models, or None where none of them has one."""
    members = family.members if isinstance(family, Families) else {"": family}
    found = [layout_of(member.config, prefix) for prefix, member in members.items()]
    parts = tuple(layout for layout in found if layout is not None)
    return Layouts(parts, f"transformers {VERSION}, {', '.join(dict.fromkeys(part.title for part in parts))}") if parts else None


def every_layout() -> Iterator[Layouts]:
    """The layouts of all models, for a base that does not say which it is; those with the same rules once."""
    found = table()
    seen = set()
    rows = {name: ("", (Part(name, None),)) for name in found.rules if name != _OLD} | dict(found.models)
    for name, (prefix, parts) in rows.items():
        rules = rules_of(prefix, parts)
        if rules not in seen:
            seen.add(rules)
            yield Layouts((Layout(name, rules),), f"transformers {VERSION}, told by the names alone")


def rules_of(prefix: str, parts: tuple[Part, ...]) -> tuple[Rule, ...]:
    """The rules of a model's parts, each where it holds."""
    return tuple(_rule(row, _scope(part.path, prefix)) for part in parts for row in table().rules[part.key])


def _scope(path: str | None, prefix: str) -> Scope:
    """What names below a path begin with: with the prefix of the base model, and without, as a file without its head has them."""
    if path is None:
        return ()
    below, first = f"{path}." if path else "", f"{prefix}." if prefix else ""
    return tuple(dict.fromkeys((first + below, below)))


def _rule(row: tuple[str, ...], scope: Scope) -> Rule:
    kind, sources, targets, *more = row
    if kind == "experts":
        return Fusion(tuple(sources.split(" ")), targets, scope)
    if kind == "other":
        return Other(tuple(sources.split(" ")), tuple(targets.split(" ")), more[0], scope)
    if kind == "group":
        pairs = zip(sources.split(" "), targets.split(" "), strict=True)
        return Group(tuple(Rename(source, target, scope) for source, target in pairs))
    return Rename(sources, targets, scope, int(kind.partition("+")[2] or 0))
