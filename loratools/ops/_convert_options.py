"""The options of a conversion, checked before a file is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loratools import threads as workers
from loratools.errors import OptionError, UsageError
from loratools.formats import FORMATS
from loratools.layouts.networks import SIDES
from loratools.tensors import dtype_code

KINDS = ("lora", "dora", "dense")
AXES = ("in", "out")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every delta becomes, along which axis a DoRA's magnitudes are, the rank or the relative error to stay within."""

    kind: str | None
    axis: str | None
    rank: int | None
    limit: float | None
    code: str | None
    device: str
    threads: int

    GIVEN = ("kind", "magnitude_axis", "rank", "energy", "max_error", "dtype", "device", "threads", "format", "layout")

    @classmethod
    def checked(
        cls, *, kind: str | None, magnitude_axis: str | None, rank: int | None, energy: float | None, max_error: float | None,
        dtype: str | None, device: str, threads: int | None, format: str | None, layout: str | None,
    ) -> Options:  # fmt: skip
        ranks = {"--rank": rank, "--energy": energy, "--max-error": max_error}
        chosen = [name for name, value in ranks.items() if value is not None]
        _check(len(chosen) < 2, "at most one way to choose ranks", " and ".join(chosen), " or ".join(ranks))
        _check(kind in (None, *KINDS), "--kind", kind, " or ".join(KINDS))
        _check(magnitude_axis in (None, *AXES), "--magnitude-axis", magnitude_axis, " or ".join(AXES))
        _check(layout in (None, *SIDES), "--layout", layout, " or ".join(SIDES))
        _check(rank is None or (type(rank) is int and rank >= 1), "--rank", rank, "a whole number of at least 1")
        _check(energy is None or 0 < energy <= 1, "--energy", energy, "more than 0, at most 1")
        _check(max_error is None or 0 < max_error < 1, "--max-error", max_error, "between 0 and 1")
        _check(threads is None or threads >= 1, "--threads", threads, "at least 1")
        written = [row.name for row in FORMATS if row.encode]
        _check(format is None or format in written, "unknown --format", format, " or ".join(written))
        computes = kind == "lora" or magnitude_axis is not None
        found, expected = f"--kind {kind}" if kind else "no --kind", "--kind lora or --magnitude-axis"
        _check(computes or not chosen, f"{''.join(chosen)} is for what is approximated", found, expected)
        fact = "--dtype is for what is computed anew; all else keeps its bytes"
        _check(computes or kind == "dense" or dtype is None, fact, found, f"--kind dense, {expected}")
        if magnitude_axis is not None and kind in ("lora", "dense"):
            raise UsageError(f"--kind {kind} leaves no magnitudes", found=f"--magnitude-axis {magnitude_axis}")
        _check_device(device)
        return cls(
            kind=kind, axis=magnitude_axis, rank=rank, limit=math.sqrt(1 - energy) if energy is not None else max_error,
            code=dtype_code(dtype) if dtype else None, device=device,
            threads=threads or (workers.default_threads() if device == "cpu" else 1),
        )  # fmt: skip

    @property
    def changes(self) -> bool:
        """Whether any delta becomes another; else it is a change of format alone."""
        return self.kind is not None or self.axis is not None


def _check(holds: bool, option: str, found: object, expected: str) -> None:
    if not holds:
        raise UsageError(option, found=found, expected=expected)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError("--device", found=device, expected="one that torch has here", remedy=str(error).splitlines()[0][:80]) from None
