"""Rules that lead from a tensor's name in a file to its name in memory, and its place there: whole, or a matrix of a fused stack.

They are applied as transformers applies them when it loads a file (`core_model_loading.py`, 5.23): every renaming in turn, then at most one
conversion. A scope is where in the network a rule holds, with the prefix of the base model or without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

Scope: TypeAlias = tuple[str, ...]  # what a name begins with for a rule to hold, the longest first; () is everywhere


@dataclass(frozen=True)
class Place:
    """A tensor's name in memory; `expert` and `part` (of `parts`, one above the other) where it is a matrix of a stack there."""

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Refused:
    """What would become other tensors by `operation`, which is not done here; their names in memory."""

    names: tuple[str, ...]
    operation: str


@dataclass(frozen=True)
class Rename:
    """The text that a pattern matches becomes another, in which \\1 is the pattern's group, a number plus `offset` if there is one."""

    pattern: str
    target: str
    scope: Scope = ()
    offset: int = 0

    @cached_property
    def compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def __call__(self, name: str) -> str:
        found = matched(self.compiled, name, self.scope)
        if found is None:
            return name
        prefix, rest, match = found
        group = match[1] if "\\1" in self.target else ""
        group = str(int(group) + self.offset) if self.offset else group
        return prefix + rest.replace(match[0], self.target.replace("\\1", group), 1)


@dataclass(frozen=True)
class Group:
    """Renamings that hold only if any tensor's name has the first one's pattern: their sources and targets share names."""

    renames: tuple[Rename, ...]

    def __call__(self, name: str) -> str:
        return next((new for rename in self.renames if (new := rename(name)) != name), name)

    def holds(self, names: Iterable[str]) -> bool:
        first = self.renames[0]
        return any(matched(first.compiled, name, first.scope) is not None for name in names)


@dataclass(frozen=True)
class Fusion:
    """Matrices, one pattern for each part of an expert's, that are stacked in memory; the group is the expert's number."""

    patterns: tuple[str, ...]
    target: str
    scope: Scope = ()

    @cached_property
    def compiled(self) -> tuple[re.Pattern[str], ...]:
        return tuple(map(re.compile, self.patterns))

    def __call__(self, name: str) -> Place | None:
        for part, pattern in enumerate(self.compiled):
            found = matched(pattern, name, self.scope)
            if found is not None:
                prefix, rest, match = found
                return Place(prefix + rest.replace(match[0], self.target, 1), int(match[1]), part, len(self.patterns))
        return None


@dataclass(frozen=True)
class Other:
    """What transformers converts and these rules do not."""

    patterns: tuple[str, ...]
    targets: tuple[str, ...]
    operation: str
    scope: Scope = ()

    @cached_property
    def compiled(self) -> tuple[re.Pattern[str], ...]:
        return tuple(map(re.compile, self.patterns))

    @property
    def turns(self) -> bool:
        """Whether it only turns matrices, under the name that they had: of files that lie both ways."""
        return self.operation == "Transpose" and self.patterns == (f"{self.targets[0]}(?!\\w)",)

    def __call__(self, name: str) -> Refused | None:
        for pattern in () if self.turns else self.compiled:
            found = matched(pattern, name, self.scope)
            if found is not None:
                prefix, rest, match = found
                return Refused(tuple(prefix + rest.replace(match[0], target, 1) for target in self.targets), self.operation)
        return None


Rule: TypeAlias = Rename | Group | Fusion | Other


def matched(pattern: re.Pattern[str], name: str, scope: Scope) -> tuple[str, str, re.Match[str]] | None:
    """What stands before the scope's names, the rest, and the match in it; None where the rule does not hold."""
    prefix = next((prefix for prefix in scope if name.startswith(prefix)), None) if scope else ""
    if prefix is None:
        return None
    rest = name[len(prefix) :]
    match = pattern.search(rest)
    return None if match is None else (prefix, rest, match)


@dataclass(frozen=True)
class Layout:
    """The rules of one model, of the tensors whose names begin with `within`, which is no part of their names to the rules."""

    title: str
    rules: tuple[Rule, ...]
    within: str = ""

    def places(self, names: Sequence[str]) -> dict[str, Place | Refused]:
        """Where each of the names, which are all that there are, leads; one that is not within is left out."""
        own = {name: name[len(self.within) :] for name in names if name.startswith(self.within)}
        renames: list[Callable[[str], str]] = []
        for rule in self.rules:
            if isinstance(rule, Rename) or (isinstance(rule, Group) and rule.holds(_renamed(own.values(), renames))):
                renames.append(rule)
        return {name: self._within(self._place(next(_renamed([inner], renames)))) for name, inner in own.items()}

    def _place(self, name: str) -> Place | Refused:
        for rule in self.rules:
            found = rule(name) if isinstance(rule, Fusion | Other) else None
            if found is not None:
                return found
        return Place(name)

    def _within(self, found: Place | Refused) -> Place | Refused:
        if isinstance(found, Refused):
            return Refused(tuple(self.within + name for name in found.names), found.operation)
        return Place(self.within + found.name, found.expert, found.part, found.parts)

    def turns(self, name: str) -> bool:
        """Whether files store the matrices of this name both ways round."""
        inner = name.removeprefix(self.within)
        others = [rule for rule in self.rules if isinstance(rule, Other) and rule.turns]
        return any(matched(pattern, inner, rule.scope) is not None for rule in others for pattern in rule.compiled)


def _renamed(names: Iterable[str], renames: Sequence[Callable[[str], str]]) -> Iterator[str]:
    for name in names:
        for rename in renames:
            name = rename(name)
        yield name


@dataclass(frozen=True)
class Layouts:
    """The layouts of a checkpoint's models, each of its own tensors."""

    parts: tuple[Layout, ...]
    title: str

    @property
    def size(self) -> int:
        return sum(len(part.rules) for part in self.parts)

    def places(self, names: Sequence[str]) -> Mapping[str, Place | Refused]:
        """Where each name leads: to itself where no layout has it."""
        found: dict[str, Place | Refused] = {name: Place(name) for name in names}
        for part in self.parts:
            found |= part.places(names)
        return found

    def turns(self, name: str) -> bool:
        return any(part.turns(name) for part in self.parts)
