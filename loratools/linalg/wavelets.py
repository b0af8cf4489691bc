"""Orthogonal wavelets: their filters, and one step of the inverse transform along the rows of a matrix.

`wavelets.json` holds the lowpass filters that reconstruct, as peft 0.21.2 has them (`tuners/waveft/wavelet.py`, after the tables of
PyWavelets, MIT licence): Daubechies' extremal ones (db1 to db10), symlets (sym2 to sym10) and coiflets (coif1 to coif4; the last is
there not quite orthogonal). Daubechies, "Ten Lectures on Wavelets", 1992.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loratools.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

Filters: TypeAlias = "tuple[float, ...]"


@cache
def _table() -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads(Path(__file__).with_name("wavelets.json").read_text(encoding="utf-8"))
    return found


def names() -> list[str]:
    """The wavelets there are."""
    return list(_table())


def filters(name: str) -> tuple[Filters, Filters]:
    """The lowpass and highpass filters that reconstruct; the second is the first backwards, every other sign changed.

    Raises OptionError for a name that is not known.

    >>> low, high = filters("db2")
    >>> len(low), high[0] == low[-1], high[1] == -low[-2]
    (4, True, True)
    """
    if name not in _table():
        raise OptionError("unknown wavelet", found=name, expected="db1 to db10, sym2 to sym10 or coif1 to coif4")
    low = tuple(_table()[name])
    return low, tuple(-value if index % 2 else value for index, value in enumerate(reversed(low)))


def combined(halves: Iterable[tuple[Tensor, Filters]], start: int, count: int) -> Tensor:
    """Σ over halves of Σₖ X[k]·f[i − 2k], rows i from `start` on, `count` of them: X (rows, columns), f a filter.

    Every product and every addition is one operation of its own, in the order of the halves and, within, of the filter's numbers: the
    same bits for any rows asked for, as long as X has all that they reach.

    >>> import torch
    >>> combined([(torch.tensor([[1.0], [2.0]]), (1.0, 10.0))], 1, 3).flatten().tolist()
    [10.0, 2.0, 20.0]
    """
    total: Tensor | None = None
    for X, f in halves:
        if total is None:
            total = X.new_zeros(2 * max(len(X), 1) - 2 + max(len(f), start + count), X.shape[1])
        for index, value in enumerate(f):
            total[index : index + 2 * len(X) : 2][: len(X)] += X * value
    assert total is not None
    return total[start : start + count]
