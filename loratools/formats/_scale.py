"""Scales of formats whose files do not hold them: alphas that give a scaling exactly, and the ones written beside the tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from loratools.errors import FormatError, NotExpressible, ShapeError
from loratools.formats._refused import nothing

ALPHA = "loratools.alpha"  # metadata of files that loratools writes in formats without an alpha


def exact_alpha(scaling: float, rank: int) -> float:
    """The alpha whose quotient by the rank is this scaling, to the last bit where there is one. Raises ShapeError for rank 0.

    >>> exact_alpha(16.0, 7)
    112.0
    """
    if rank == 0:
        raise ShapeError("rank 0", expected="a rank of at least 1")
    near = scaling * rank
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in candidates if alpha / rank == scaling), near)


def number(metadata: Mapping[str, str], key: str) -> float | None:
    """A number in a file's metadata, None if it has none. Raises FormatError for what is no number."""
    if key not in metadata:
        return None
    try:
        value = float(metadata[key])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise FormatError(f"metadata {key} is not a number", found=metadata[key])
    return value


def only(values: Mapping[str, float], why: str, remedy: str) -> float:
    """The one value all have. Raises NotExpressible, naming two that differ, with the reason that there can be one only, and the way."""
    found = next(iter(values.items()), None)
    if found is None:
        raise nothing()
    other = next(((name, value) for name, value in values.items() if value != found[1]), None)
    if other is not None:
        raise NotExpressible(why, tensor=other[0], found=other[1], expected=f"{found[1]}, as {found[0]} has", remedy=remedy)
    return found[1]
