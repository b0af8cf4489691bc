"""rescale: an adapter's alpha, its strength, or its rsLoRA flag; ΔW = scaling·B·A with scaling = alpha / r or alpha / √r.

A new alpha keeps ΔW: B takes the factor that the scaling loses. Another strength, or flag, moves alpha and leaves the factors' bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from loratools.adapter import Adapter
from loratools.compress import alpha_for, rounded
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, UnsupportedError, UsageError, raise_all
from loratools.formats.base import read_options
from loratools.formats.reading import Reading, arguments, paths, reads
from loratools.ops._algebra import bias_of, format_of, label, loaded, low_of, scaled_to, with_low, write
from loratools.output import check_output
from loratools.receipt import Receipt
from loratools.tensors import read_tensor


@reads
def rescale(
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    alpha: float | None = None,
    by: float | None = None,
    rslora: bool | None = None,
    bake: bool = False,
    format: str | None = None,
    sha256: bool = False,
    overwrite: bool = False,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Write an adapter with another alpha, strength or rsLoRA flag; returns the receipt.

    `alpha` gives every module this alpha and keeps ΔW, B taking the factor: exact for powers of two, else rounded once to B's
    dtype, the error stated. `by` multiplies ΔW and keeps the factors' bytes. `rslora` sets or clears the flag and moves alpha so
    that ΔW stays. `bake` writes alpha = r everywhere and no rsLoRA: all of the scaling is inside B. Raises OptionError for
    options that contradict each other, UnsupportedError for a strength that the adapter's kind cannot take (DoRA, saved tensors),
    NonFiniteError for a factor that overflows.

    >>> receipt = rescale("adapter/", "stronger/", by=1.5)  # doctest: +SKIP
    >>> receipt["tensors"][0]["scaling"] / receipt["tensors"][0]["scaling_before"]  # doctest: +SKIP
    1.5
    """
    words = arguments(locals(), "adapter", "out")
    change = _Rescaling(alpha=alpha, by=by, rslora=rslora, bake=bake)
    target = check_output(out, overwrite=overwrite, inputs=paths(reading, [adapter]))
    source = loaded(adapter, read_options(reading))
    receipt = Receipt("rescale", {"adapter": label(adapter), "out": str(out), **words})
    try:
        deltas, receipt.tensors = change.apply(source)
    except LoratoolsError as error:
        raise error.at(file=source.path) from None
    receipt.expected = receipt.applied = len(deltas)
    receipt.notes = list(source.notes)
    return write(receipt, replace(source, deltas=deltas), [source], target, format_of(format, source), sha256=sha256)


@dataclass(frozen=True, kw_only=True)
class _Rescaling:
    """The options, checked, as a map over deltas."""

    alpha: float | None
    by: float | None
    rslora: bool | None
    bake: bool

    def __post_init__(self) -> None:
        given = {"--alpha": self.alpha is not None, "--by": self.by is not None, "--bake": self.bake}
        chosen = [name for name, there in given.items() if there]
        if len(chosen) > 1 or (not chosen and self.rslora is None):
            expected = " or ".join([*given, "--rslora", "--no-rslora"])
            raise UsageError("one way to rescale is needed", found=" and ".join(chosen) or "none", expected=expected)
        if self.bake and self.rslora:
            raise UsageError("--bake puts the scaling into B, and leaves no rsLoRA", found="--bake and --rslora")
        for name, value in (("--alpha", self.alpha), ("--by", self.by)):
            if value is not None and (not math.isfinite(value) or value == 0 or (name == "--alpha" and value < 0)):
                expected = "a finite number above 0" if name == "--alpha" else "a finite number other than 0"
                raise UsageError(name, found=value, expected=expected)

    def apply(self, source: Mapping[str, Delta]) -> tuple[dict[str, Delta], list[dict[str, Any]]]:
        """The deltas rescaled, and a row for each that has a scaling; biases follow the LoRA of their module."""
        made: dict[str, Delta] = {}
        rows: list[dict[str, Any]] = []
        faults: list[LoratoolsError] = []
        for name, delta in source.items():
            try:
                made[name], row = self._delta(delta)
            except LoratoolsError as fault:
                faults.append(fault.at(tensor=name))
                continue
            rows += [{"name": name, "kind": delta.kind, **row}] if row else []
        raise_all(faults)
        for name, delta in source.items():
            if isinstance(delta, Full):
                low = bias_of(name, made)
                scaling = low.scaling if low else delta.scale * (self.by or 1.0)
                made[name], lost = scaled_to(delta, scaling, self.by or 1.0)
                factor = delta.scale * (self.by or 1.0) / scaling if scaling and made[name].refs()["diff"] is not delta.diff else 1.0
                rows.append({"name": name, "kind": delta.kind, **_row(None, delta.scale, scaling, factor, lost)})
        return made, rows

    def _delta(self, delta: Delta) -> tuple[Delta, dict[str, Any] | None]:
        low = low_of(delta)
        if self.by is not None and not isinstance(delta, LowRank | Full):
            raise UnsupportedError(
                f"--by on {delta.called} delta: its change of W is no multiple of its tensors, so its strength needs the base",
                remedy="merge takes a strength, as in ADAPTER:0.5" + ("; --alpha keeps W'" if isinstance(delta, DoRA) else ""),
            )
        if low is None:
            return delta, None
        flag = not self.bake and (low.rslora if self.rslora is None else self.rslora)
        alpha, factor = self._alpha(low, flag)
        after = replace(low, alpha=alpha, rslora=flag)
        after, error = (after, 0.0) if factor == 1 else _taken(low, after, factor)
        row = {"alpha_before": low.alpha, "alpha": alpha, **_row(low.rank, low.scaling, after.scaling, factor, error)}
        return with_low(delta, after), row

    def _alpha(self, low: LowRank, flag: bool) -> tuple[float, float]:
        """The new alpha, and the factor that B takes."""
        if self.by is not None:
            return (low.alpha * self.by if flag == low.rslora else alpha_for(low.scaling * self.by, low.rank, flag)), 1.0
        alpha = float(low.rank) if self.bake else self.alpha
        if alpha is None:
            return (low.alpha if flag == low.rslora else alpha_for(low.scaling, low.rank, flag)), 1.0
        if flag == low.rslora:
            return alpha, low.alpha / alpha
        return alpha, low.scaling / replace(low, alpha=alpha, rslora=flag).scaling


def _row(rank: int | None, before: float, after: float, factor: float, error: float) -> dict[str, Any]:
    return {"rank": rank, "scaling_before": before, "scaling": after, "factor": factor, "error": error}


def _taken(low: LowRank, after: LowRank, factor: float) -> tuple[LowRank, float]:
    """B times the factor, rounded once, and ‖ΔW' − ΔW‖/‖ΔW‖."""
    import torch

    from loratools.linalg.product import product_norm

    B, A = low.factors()
    stored = rounded(B * factor, low.B.spec.dtype)
    moved = read_tensor(stored, torch.float64) - B * factor
    norm = product_norm(B * factor, A)
    error = product_norm(moved, A) / norm if norm else 0.0
    if low.B.spec.dtype == "F64" and norm and abs(math.frexp(factor)[0]) != 0.5:
        error = 2.0**-53  # float64 itself cannot show what rounding to it costs
    return replace(after, B=stored), error
