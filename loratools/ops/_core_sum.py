"""Σ wᵢ·ΔWᵢ of changes that are small products, through the core of their concatenated factors; nothing m × n is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from loratools.compress import (
    Style,
    as_low,
    concatenated,
    error_of,
    known_of,
    lossless_rank,
    recast,
    rounded,
    style_of,
    truncated,
    widest,
    within,
)  # fmt: skip
from loratools.deltas.base import Additive
from loratools.deltas.lowrank import LowRank
from loratools.errors import NonFiniteError
from loratools.factors import Factored
from loratools.ops._combine_options import Options
from loratools.tensors import read_tensor


def summed(terms: Sequence[tuple[Additive, float]], options: Options, shape: tuple[int, ...], layer: str) -> Factored | None:
    """Σ wᵢ·ΔWᵢ as one LoRA of a weight of that shape; None where one of them has no product smaller than its change.

    Alone it keeps its own factors, else it is the exact concatenation or the core's, whichever is nearer as stored.
    """
    first, weight = terms[0]
    if len(terms) == 1 and isinstance(first, LowRank):
        return _alone(first, weight, options)
    lows = [(low, weight) for delta, weight in terms if (low := as_low(delta, shape)) is not None]
    if len(lows) < len(terms):
        return None
    written = options.code or ("F64" if widest([delta for delta, _ in terms]) == "F64" else "F32")
    style = Style(code=written, shape=shape, layer=layer)
    known, noise = known_of(lows)
    needed, whole = lossless_rank(known, noise, written), sum(low.rank for low, _ in lows)
    if options.limit is not None:
        within_limit = within(known, noise, options.limit, style, needed)
        if within_limit is not None:
            return within_limit
    found = truncated(known, min(options.rank or needed, needed), style)
    if needed == whole and (options.rank is None or options.rank >= whole):
        joined = replace(concatenated(lows, written), layer=layer)
        error = error_of(known, joined)
        if error < found.error:
            return replace(found, delta=joined, error=error, optimal=0.0)
    return found


def _alone(low: LowRank, weight: float, options: Options) -> Factored:
    """One LoRA: its alpha takes the weight, its factors keep their bytes unless another rank or dtype is asked for."""
    import torch

    scaled = replace(low, alpha=low.alpha * weight)
    if scaled.alpha < 0:  # a sign goes into B exactly; readers take an alpha below 0 for none
        scaled = replace(scaled, alpha=-scaled.alpha, B=rounded(-read_tensor(low.B, torch.float64), low.B.spec.dtype))
    style = style_of(scaled, options.code)
    if options.rank is not None and options.rank < low.rank:
        return truncated(known_of([(scaled, 1.0)])[0], options.rank, style)
    if options.limit is not None:
        found = within(*known_of([(scaled, 1.0)]), options.limit, style, low.rank)
        if found is not None:
            return found
    return _kept(scaled, options.code)


def _kept(low: LowRank, code: str | None) -> Factored:
    if code is None or {low.A.spec.dtype, low.B.spec.dtype} == {code}:
        norm = low.norm()
        if not math.isfinite(norm):
            raise NonFiniteError("a factor holds inf or nan")
        return Factored(delta=low, norm=norm, error=0.0, optimal=0.0, method="kept")
    known, _ = known_of([(low, 1.0)])
    cast = replace(low, A=recast(low.A, code), B=recast(low.B, code))
    return Factored(delta=cast, norm=low.norm(), error=error_of(known, cast), optimal=0.0, method="kept")
