"""The words by which a user says what an adapter's file leaves open, for every function that reads one: defined once.

    @reads
    def merge(base, adapters, out, *, dtype=None, **reading: Unpack[Reading]): …

takes them as keywords of its own, as its signature shows; inside, `reading` has them all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypedDict, TypeVar

from loratools.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")


class Reading(TypedDict, total=False):
    """The words of `formats.base.read_options`, which tells what each means."""

    from_format: str | None
    alpha_in: float | None
    scale: str | None
    scratch_dora: str | None
    enable_lora: str | None
    conv: Sequence[str]
    transposed: Sequence[str]
    embedding: Sequence[str]
    initial: str | Path | None


DEFAULTS: Mapping[str, Any] = {
    "from_format": None, "alpha_in": None, "scale": None, "scratch_dora": None, "enable_lora": None, "conv": (), "transposed": (),
    "embedding": (), "initial": None,
}  # fmt: skip
_NAME = "reading"


def reads(function: Callable[P, R]) -> Callable[P, R]:
    """The function with the words of `Reading` as keywords, those not given at their defaults; others are a TypeError as ever.

    >>> @reads
    ... def told(path: str, **reading: Any) -> Any:
    ...     return reading["alpha_in"], reading["conv"]
    >>> told("x", alpha_in=8)
    (8, ())
    """
    own = [word for word in inspect.signature(function).parameters.values() if word.kind is not word.VAR_KEYWORD]
    more = [inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Reading.__annotations__[word])
            for word, default in DEFAULTS.items()]  # fmt: skip
    signature = inspect.signature(function).replace(parameters=[*own, *more])

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs)  # names a word that there is not
        return function(*bound.args, **{**DEFAULTS, **bound.kwargs})

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


def arguments(local: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """A function's `locals()` at its beginning as a receipt has them, the words of reading among the others."""
    return {name: value for name, value in {**local, **local[_NAME]}.items() if name not in (*without, _NAME)}


def paths(reading: Reading, adapters: Sequence[object], *more: str | Path | None) -> list[str | Path]:
    """All paths that are read: those among the adapters and the others, and what the words name.

    Raises OptionError for `initial` beside anything but one adapter that is read from a file.
    """
    initial = reading["initial"]
    if initial is not None and not (len(adapters) == 1 and isinstance(adapters[0], str | Path)):
        found = f"{len(adapters)} adapters" if len(adapters) != 1 else "one in memory"
        raise OptionError("--initial belongs to one adapter's file", found=found, remedy="convert that one first")
    return [path for path in (*adapters, *more, initial) if isinstance(path, str | Path)]
