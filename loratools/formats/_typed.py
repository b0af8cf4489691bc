"""Whether a value read from JSON is what a dataclass's field is annotated with, down to the items of its tuples and tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotation; whole numbers are floats, truth values are no numbers.

    >>> fits(1, float | None), fits(True, int), fits(("a", None), tuple[str | None, ...])
    (True, False, True)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        same = len(inner) == 2 and inner[1] is ...
        wanted = inner[:1] * len(value) if same and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(fits, value, wanted))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(item, inner[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return type(value) is int
    return hint is Any or (isinstance(hint, type) and isinstance(value, hint))


def known(hint: Any) -> bool:
    """Whether `fits` can tell of an annotation at all."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType, tuple) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return all(known(one) for one in inner if one is not ...)
    return origin is Literal or (origin is None and isinstance(hint, type))


def described(hint: Any) -> str:
    """An annotation as a message says it.

    >>> described(float | None)
    'float or null'
    """
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(described, get_args(hint)))
    if hint is NoneType:
        return "null"
    return str(hint.__name__) if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
