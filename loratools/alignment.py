"""An adapter's names brought to how the base spells them: one prefix for the whole adapter, and a few old spellings.

A base model saved without its head lacks the prefix of the class that was trained (`transformer.h.0…` in memory, `h.0…` on
disk), or has one too much; heads beside it carry none. Spellings are those that transformers renames when it loads a file:
`LayerNorm.gamma`, `LayerNorm.beta`, and the two halves of a weight norm (conversion_mapping.py, torch.nn.utils.parametrizations).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from loratools.errors import AmbiguousError, MatchError

T = TypeVar("T")
_PAIRS = (
    ("LayerNorm.weight", "LayerNorm.gamma"),
    ("LayerNorm.bias", "LayerNorm.beta"),
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
)
_SPELT = dict(_PAIRS) | {other: one for one, other in _PAIRS}


def align(named: Mapping[str, T], needing: Collection[str], base: Collection[str]) -> tuple[dict[str, T], list[str]]:
    """What is `named` under the base's names, and sentences that say what was aligned; `needing` names must be in the base.

    A name that the base has stays. A prefix is added to, or removed from, the others if that makes names meet the base and no
    name that meets it already begins so; a new tensor follows where the base has its parent there. Raises AmbiguousError for
    several prefixes that fit as many, MatchError for two names that become one.
    """
    probe = list(needing) or list(named)
    met = [name for name in probe if respelt(name, base)]
    lost = [name for name in probe if not respelt(name, base)]
    pair = _prefix(lost, met, base) if lost else None
    aligned: dict[str, T] = {}
    spelt: dict[str, str] = {}
    kept = []
    for name, value in named.items():
        moved = respelt(name, base) or (_moved(name, pair, base, needs=name in needing) if pair else name)
        place = respelt(moved, base) or moved
        if place in aligned:
            raise MatchError("two tensors of the adapter meet under this name of the base", tensor=place, remedy="give --rename OLD=NEW")
        aligned[place] = value
        if pair and place == name:
            kept.append(name)
        if not place.endswith(name) and not name.endswith(place):
            spelt[name] = place
    return aligned, [*([_said(pair, kept)] if pair else []), *([_said_spelt(spelt)] if spelt else [])]


def respelt(name: str, base: Collection[str]) -> str | None:
    """The name if the base has it, or its other spelling if the base has that.

    >>> respelt("encoder.LayerNorm.weight", ["encoder.LayerNorm.gamma"])
    'encoder.LayerNorm.gamma'
    """
    return next((found for found in (name, *_spellings(name)) if found in base), None)


def _spellings(name: str) -> list[str]:
    endings = [ending for ending in _SPELT if f".{name}".endswith(f".{ending}")]
    return [name.removesuffix(ending) + _SPELT[ending] for ending in endings]


def _prefix(lost: list[str], met: list[str], base: Collection[str]) -> tuple[str, str] | None:
    """The (removed, added) pair under which most of the lost names meet the base; None where it would not be the adapter's own."""
    pairs = [pair for pair in _candidates(lost[:8], base) if not any(name.startswith(pair[0] or pair[1]) for name in met)]
    fits = {pair: sum(respelt(_swap(name, pair), base) is not None for name in lost) for pair in pairs}
    most = max(fits.values(), default=0)
    if not most or (most < len(lost) and most <= len(met)):
        return None
    best, *rivals = [pair for pair, count in fits.items() if count == most]
    if rivals:
        shown = " or ".join(repr(added or f"without {removed}") for removed, added in (best, *rivals))
        raise AmbiguousError("the adapter's names fit the base under several prefixes", found=shown, remedy="give --rename OLD=NEW")
    return best


def _candidates(names: list[str], base: Collection[str]) -> list[tuple[str, str]]:
    """(removed, added) pairs under which one of the names meets the base."""
    found: dict[tuple[str, str], None] = {}
    for name in names:
        parts = name.split(".")
        cuts = range(1, len(parts) - 1)
        found |= {(".".join(parts[:cut]) + ".", ""): None for cut in cuts if respelt(".".join(parts[cut:]), base)}
        for spelling in (name, *_spellings(name)):
            found |= {("", other[: -len(spelling)]): None for other in base if other.endswith("." + spelling)}
    return list(found)


def _swap(name: str, pair: tuple[str, str]) -> str:
    removed, added = pair
    return name.removeprefix(removed) if removed else added + name


def _moved(name: str, pair: tuple[str, str], base: Collection[str], *, needs: bool) -> str:
    """The name under the prefix, if it belongs there: what is new, such as a head, only where its parent is."""
    moved = _swap(name, pair)
    there = needs or pair[0] or respelt(moved, base) or any(other.startswith(pair[1] + name.split(".")[0] + ".") for other in base)
    return moved if there else name


def _said(pair: tuple[str, str], kept: list[str]) -> str:
    removed, added = pair
    said = f"names aligned for the whole adapter: {f'prefix {removed!r} removed' if removed else f'prefix {added!r} added'}"
    more = f", and {len(kept) - 3} more" if len(kept) > 3 else ""
    return said + (f"; as they are: {', '.join(kept[:3])}{more}" if kept else "")


def _said_spelt(spelt: Mapping[str, str]) -> str:
    name, place = next(iter(spelt.items()))
    more = f", and {len(spelt) - 1} more alike" if len(spelt) > 1 else ""
    return f"names as the base spells them: {name} is {place}{more}"
