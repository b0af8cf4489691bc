"""The options of a combination, checked before a file is opened: which belong to which method, and how ranks are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import UsageError
from loratools.tensors import dtype_code

# what each method takes beside weights and ranks; the first is needed
METHODS = {
    "sum": (),
    "ties": ("density", "majority_sign"),
    "dare-linear": ("density", "seed"),
    "dare-ties": ("density", "majority_sign", "seed"),
    "magnitude-prune": ("density",),
    "della": ("density", "epsilon", "majority_sign", "seed"),
}
SIGNS = ("total", "frequency")
EPSILON = 0.15  # mergekit's
DEFAULTS: dict[str, Any] = {"majority_sign": "total", "seed": 0, "epsilon": EPSILON}
RANKS = ("rank", "energy", "max_error")
GIVEN = ("method", *RANKS, "density", "majority_sign", "seed", "epsilon", "dtype")
WAYS = "--rank, --energy or --max-error"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a combination: the method with what it takes, the rank or the relative error to stay within, the dtype."""

    method: str
    rank: int | None
    limit: float | None
    density: float
    majority_sign: str
    seed: int
    epsilon: float
    code: str | None

    @property
    def sparse(self) -> bool:
        """Whether something is pruned of each change before they are put together."""
        return self.method != "sum"

    @property
    def chosen(self) -> bool:
        """Whether there is a rule for ranks."""
        return self.rank is not None or self.limit is not None

    def takes(self, word: str) -> bool:
        """Whether the method has a use for an option."""
        return word in METHODS[self.method]


def checked(words: Mapping[str, Any]) -> Options:
    """The options of these words, by their names in Python; raises OptionError for what has no meaning together."""
    method = words["method"]
    if method not in METHODS:
        raise UsageError("unknown --method", found=method, expected=" or ".join(METHODS))
    takes = METHODS[method]
    for word in ("density", *DEFAULTS):
        if words[word] is not None and word not in takes:
            raise UsageError(f"{_spelt(word)} has no meaning for --method {method}", found=words[word])
    ways = [_spelt(word) for word in RANKS if words[word] is not None]
    if len(ways) > 1 or (takes and not ways):
        fact = f"--method {method} needs one way to choose ranks" if takes else "at most one way to choose ranks"
        raise UsageError(fact, found=" and ".join(ways) or "none", expected=WAYS)
    density = words["density"]
    if takes and density is None:
        raise UsageError(f"--method {method} needs --density, the share of each change that stays")
    _check_ranges(words)
    settled = {word: default if words[word] is None else words[word] for word, default in DEFAULTS.items()}
    energy, dtype = words["energy"], words["dtype"]
    return Options(
        method=method, rank=words["rank"], limit=math.sqrt(1 - energy) if energy is not None else words["max_error"],
        density=1.0 if density is None else density, code=dtype_code(dtype) if dtype else None, **settled,
    )  # fmt: skip


def _check_ranges(words: Mapping[str, Any]) -> None:
    rank, energy, error, density = (words[word] for word in (*RANKS, "density"))
    _check(rank is None or (type(rank) is int and rank >= 1), "rank", rank, "a whole number of at least 1")
    _check(energy is None or 0 < energy <= 1, "energy", energy, "more than 0, at most 1")
    _check(error is None or 0 < error < 1, "max_error", error, "between 0 and 1")
    _check(density is None or 0 < density <= 1, "density", density, "more than 0, at most 1")
    epsilon, signs, seed = words["epsilon"], words["majority_sign"], words["seed"]
    _check(epsilon is None or 0 <= epsilon < 0.5, "epsilon", epsilon, "at least 0, less than 0.5")
    _check(signs in (None, *SIGNS), "majority_sign", signs, " or ".join(SIGNS))
    _check(seed is None or type(seed) is int, "seed", seed, "a whole number")
    if words["method"] == "della" and density != 1:
        half = EPSILON if epsilon is None else epsilon
        within = half < density < 1 - half
        _check(within, "density", f"{density:g} ± {half:g}", "between 0 and 1 with --epsilon added and taken off")


def _check(holds: bool, word: str, found: object, expected: str) -> None:
    if not holds:
        raise UsageError(_spelt(word), found=found, expected=expected)


def _spelt(word: str) -> str:
    return f"--{word.replace('_', '-')}"
