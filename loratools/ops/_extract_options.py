"""The options of an extraction, checked before a file is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratools import threads as workers
from loratools.errors import OptionError, UsageError
from loratools.factors import How
from loratools.formats import FORMATS
from loratools.ops._size import parse_size
from loratools.tensors import dtype_code

RESTS = ("save", "drop", "error")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of an extraction, checked: the rank, or the relative error to stay within, or the size of the file."""

    how: How
    rank: int | None
    limit: float | None
    size: int | None
    rest: str
    device: str
    format: str
    threads: int

    GIVEN = ("rank", "energy", "max_error", "size", "alpha", "rest", "exact", "tolerance", "dtype", "device", "format", "seed", "threads")

    @classmethod
    def checked(
        cls, *, rank: int | None, energy: float | None, max_error: float | None, size: str | int | None, alpha: float | None, rest: str,
        exact: bool, tolerance: float, dtype: str | None, device: str, format: str, seed: int, threads: int | None,
    ) -> Options:  # fmt: skip
        given = {"--rank": rank, "--energy": energy, "--max-error": max_error, "--size": size}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise UsageError("one way to choose ranks is needed", found=" and ".join(chosen) or "none", expected=" or ".join(given))
        _check(rank is None or (type(rank) is int and rank >= 1), "--rank", rank, "a whole number of at least 1")
        _check(energy is None or 0 < energy <= 1, "--energy", energy, "more than 0, at most 1")
        _check(max_error is None or 0 < max_error < 1, "--max-error", max_error, "between 0 and 1")
        _check(alpha is None or (math.isfinite(alpha) and alpha > 0), "--alpha", alpha, "a number above 0")
        _check(rest in RESTS, "--rest", rest, " or ".join(RESTS))
        _check(0 < tolerance < 1, "--tolerance", tolerance, "between 0 and 1")
        _check(threads is None or threads >= 1, "--threads", threads, "at least 1")
        written = [row.name for row in FORMATS if row.encode]
        _check(format in written, "unknown --format", format, " or ".join(written))
        _check_device(device)
        return cls(
            how=How(code=dtype_code(dtype) if dtype else "F32", alpha=alpha, exact=exact, tolerance=tolerance, seed=seed),
            rank=rank, limit=math.sqrt(1 - energy) if energy is not None else max_error, size=None if size is None else parse_size(size),
            rest=rest, device=device, format=format, threads=threads or (workers.default_threads() if device == "cpu" else 1),
        )  # fmt: skip


def _check(holds: bool, option: str, found: object, expected: str) -> None:
    if not holds:
        raise UsageError(option, found=found, expected=expected)


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.empty(0, device=device).device.type
    except (RuntimeError, AssertionError) as error:
        raise OptionError("--device", found=device, expected="one that torch has here", remedy=str(error).splitlines()[0][:80]) from None
    _check(kind in ("cpu", "cuda"), "--device", device, "cpu, cuda or cuda:N")
