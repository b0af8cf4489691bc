"""Names of repeated layers as one: `model.layers.{0..21}.mlp.up_proj`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

Numbers = tuple[int, ...]
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a component that is a number
_FLAT = re.compile(r"(?<![^._])\d+(?![^._])")  # the same in a name whose dots became underscores


def grouped(names: Iterable[str], key: Mapping[str, Hashable] | None = None) -> list[tuple[str, list[str]]]:
    """(pattern, the names it stands for) in the order of their first names; only names of equal `key` share one.

    A number is a component of the name, between underscores where the name has no dots. A pattern stands for exactly its names:
    where they are not all combinations of the numbers in it, they get several.

    >>> grouped(["h.0.q", "h.1.q", "h.3.q", "norm"])
    [('h.{0,1,3}.q', ['h.0.q', 'h.1.q', 'h.3.q']), ('norm', ['norm'])]
    """
    families: dict[Hashable, dict[Numbers, str]] = defaultdict(dict)
    listed = list(names)
    for name in listed:
        pattern = _NUMBER if "." in name.removesuffix(".weight") else _FLAT
        numbers = tuple(int(found) for found in pattern.findall(name))
        # a number written with a leading zero would come back as another name
        shape = pattern.sub("\0", name) if all(str(int(found)) == found for found in pattern.findall(name)) else name
        families[shape, key[name] if key else None][numbers if "\0" in shape else ()] = name
    rows = []
    for (shape, _), members in families.items():  # type: ignore[misc]
        for sets in _products(frozenset(members)):
            chosen = [name for numbers, name in members.items() if all(n in allowed for n, allowed in zip(numbers, sets, strict=True))]
            pieces = str(shape).split("\0")
            rows.append((pieces[0] + "".join(_braces(allowed) + rest for allowed, rest in zip(sets, pieces[1:], strict=True)), chosen))
    order = {name: place for place, name in enumerate(listed)}
    return sorted(rows, key=lambda row: order[row[1][0]])


def _products(tuples: frozenset[Numbers]) -> list[tuple[frozenset[int], ...]]:
    """The tuples as a few products of sets, which share no tuple."""
    if not tuples or not next(iter(tuples)):
        return [()]
    rests: dict[int, set[Numbers]] = defaultdict(set)
    for first, *rest in tuples:
        rests[first].add(tuple(rest))
    firsts: dict[frozenset[Numbers], set[int]] = defaultdict(set)
    for first, rest_set in sorted(rests.items()):
        firsts[frozenset(rest_set)].add(first)
    return [(frozenset(chosen), *product) for rest_set, chosen in firsts.items() for product in _products(rest_set)]


def _braces(numbers: frozenset[int]) -> str:
    """A number, or a set of them with runs of three and more shortened."""
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    shown = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return shown[0] if len(numbers) == 1 else "{" + ",".join(shown) + "}"


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key for sorting that puts layer 2 before layer 10.

    >>> sorted(["h.10.q", "h.2.q"], key=natural)
    ['h.2.q', 'h.10.q']
    """
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in name.split(".")]
