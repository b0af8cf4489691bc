"""Which of several networks an adapter's tensors are of, where their names are those of each: their sizes and block numbers.

Rows of the table tell, of the models that were published: `sizes`, the widths of a network's hidden states and how many blocks it has
under each name; `ratio`, of a matrix, rows to columns whatever the width. Evidence chooses among networks whose names fit alike, and
never refuses one that fits alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache

from loratools.layouts.networks import Network, Pairs

Shapes = Mapping[str, tuple[int, ...]]


NEVER, NOT = -2, -1


def weight(network: Network, pairs: Pairs, names: Collection[str], shapes: Shapes) -> int:
    """What names and shapes say for a network: a count of what fits it alone; 0 where nothing does, NOT if the shapes are not its.

    `shapes` are those of the weights that the adapter changes, by the same names, as far as it tells them. Numbers above the network's
    last block are NEVER its.
    """
    ends = _ends(network, names)
    if any(last > count for last, count in ends):
        return NEVER
    fits = _fits(network, shapes)
    if not all(fits) or not _square(pairs, shapes):
        return NOT
    return bool(fits) + _wide(network, shapes) + (bool(ends) and all(last == count for last, count in ends))


def _fits(network: Network, shapes: Shapes) -> list[bool]:
    """Whether each matrix of which the table tells it has as many rows for its columns as it says."""
    told = ((words, share.split(":")) for kind, words, share in network.sizes if kind == "ratio")
    ratios = [(_pattern(word), int(rows), int(columns)) for words, (rows, columns) in told for word in words.split(" ")]
    matrices = [(name, shape) for name, shape in shapes.items() if len(shape) == 2]
    return [
        shape[0] * columns == shape[1] * rows for name, shape in matrices for word, rows, columns in ratios if word.fullmatch(name)
    ]  # fmt: skip


@cache
def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(re.escape(f"{word}.weight").replace(r"\{i\}", r"\d+"))


def _square(pairs: Pairs, shapes: Shapes) -> bool:
    """Whether every fused weight that begins with q, and has k and v, could have a q of as many rows as columns."""
    fused = [(shape, pairs.original[name].shares) for name, shape in shapes.items() if name in pairs.original and len(shape) == 2]
    return all(shape[0] * shares[0] == shape[1] * sum(shares) for shape, shares in fused if len(shares) > 2)


def _ends(network: Network, names: Collection[str]) -> list[tuple[int, int]]:
    """(how many blocks the names reach, how many there are) under each of the network's names that they have."""
    told = [item.rpartition(":") for kind, *cells in network.sizes if kind == "sizes" for item in cells[1].split(" ")]
    found = []
    for word, _, count in told:
        place = re.compile(rf"{word}[._](\d+)[._]")
        met = [int(match[1]) + 1 for name in names if (match := place.match(name))]
        found += [(max(met), int(count))] if met else []
    return found


def _wide(network: Network, shapes: Shapes) -> bool:
    """Whether every matrix has as many rows or columns as a published model's hidden states."""
    widths = {int(text) for kind, *cells in network.sizes if kind == "sizes" for text in cells[0].split(" ")}
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    return bool(matrices) and any(all(width in shape for shape in matrices) for width in widths)
