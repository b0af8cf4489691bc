"""Which of several networks an adapter's tensors are of, where their names are those of each: their sizes and block numbers.

Rows of the table tell, of the models that were published: `sizes`, the widths of a network's hidden states and how many blocks it has
under each name; `ratio`, of a matrix, rows to columns whatever the width. Evidence chooses among networks whose names fit alike, and
never refuses one that fits alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from loratools.layouts.networks import Network, Pairs, form_of

Shapes = Mapping[str, tuple[int, ...]]


def weight(network: Network, pairs: Pairs, names: Collection[str], shapes: Shapes) -> int:
    """How well names and shapes fit a network: 0 if they are not its; more where its widths are theirs, or they end at its last blocks.

    `shapes` are those of the weights that the adapter changes, by the same names, as far as it tells them.
    """
    if not _lies(network, pairs, shapes):
        return 0
    ends = _ends(network, names)
    if any(last > count for last, count in ends):
        return 0
    return 1 + _wide(network, shapes) + (bool(ends) and all(last == count for last, count in ends))


def _lies(network: Network, pairs: Pairs, shapes: Shapes) -> bool:
    """Whether no matrix has rows that it cannot have for its columns: of `ratio` rows, and of fused weights that begin with a square q."""
    told = [cells for kind, *cells in network.sizes if kind == "ratio"]
    ratios = {form_of(f"{word}.weight"): tuple(map(int, share.split(":"))) for words, share in told for word in words.split(" ")}
    for name, (rows, *columns) in shapes.items():
        if len(columns) != 1 or not name.endswith(".weight"):
            continue
        cells = ratios.get(form_of(name))
        pair = pairs.original.get(name)
        if cells is not None and rows * cells[1] != columns[0] * cells[0]:
            return False
        if pair is not None and len(pair.shares) > 2 and rows * pair.shares[0] != columns[0] * sum(pair.shares):
            return False
    return True


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
