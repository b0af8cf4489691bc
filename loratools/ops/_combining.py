"""The terms of a combination, tensor by tensor: low-rank sums through their core, biases, and what cannot be summed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loratools import threads as workers
from loratools.compress import (
    Style,
    concatenated,
    error_of,
    known_of,
    lossless_rank,
    recast,
    rounded,
    style_of,
    truncated,
    widest,
)  # fmt: skip
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, MatchError, NonFiniteError, ShapeError, UnsupportedError, raise_all
from loratools.factors import Factored
from loratools.ops._algebra import bias_of, low_of, relative, shares
from loratools.tensorfile import same_bytes
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

Terms: TypeAlias = list[tuple[Delta, float, Path | None]]  # a tensor's deltas, their weights, and where they were read
Low: TypeAlias = list[tuple[LowRank, float]]


class Combination:
    """Σ wᵢ·ΔWᵢ for every tensor. `run` fills `deltas`; `rows` tells of each what it is the sum of, and its error."""

    def __init__(self, terms: dict[str, Terms], *, rank: int | None, code: str | None) -> None:
        self.terms, self.rank, self.code = terms, rank, code
        self.deltas: dict[str, Delta] = {}
        self.factored: dict[str, Factored] = {}
        self.errors: dict[str, float] = {}

    def run(self, count: int) -> None:
        faults = [fault.at(file=terms[-1][2], tensor=name) for name, terms in self.terms.items() if (fault := _fault(terms))]
        raise_all(faults)
        lows = [name for name, terms in self.terms.items() if isinstance(terms[0][0], LowRank)]
        workers.run_all([partial(self._low, name) for name in lows], count)
        for name, terms in self.terms.items():
            first = terms[0][0]
            if name in self.factored:
                self.deltas[name] = self.factored[name].delta
            elif isinstance(first, Full):
                self.deltas[name] = self._bias(name, terms)
            else:
                self.deltas[name] = first  # alone at weight 1, or the same bytes throughout

    def _low(self, name: str) -> None:
        terms = [(delta, weight) for delta, weight, _ in self.terms[name] if isinstance(delta, LowRank)]
        try:
            self.factored[name] = summed(terms, self.rank, self.code)
        except LoratoolsError as error:
            found = [place for _, _, place in self.terms[name]]
            raise error.at(file=found[0] if len(found) == 1 else None, tensor=name) from None

    def _bias(self, name: str, terms: Terms) -> Delta:
        """The sum of differences that are whole tensors, under the scaling of their module's LoRA."""
        low = bias_of(name, {key: found.delta for key, found in self.factored.items()})
        full = [(delta, weight) for delta, weight, _ in terms if isinstance(delta, Full)]
        scaling = low.scaling if low is not None else 1.0
        if len(full) == 1 and full[0][0].scale * full[0][1] == scaling and self.code in (None, full[0][0].diff.spec.dtype):
            self.errors[name] = 0.0
            return replace(full[0][0], scale=scaling)
        exact = _sum(full)
        code = self.code or ("F64" if any(delta.diff.spec.dtype == "F64" for delta, _ in full) else "F32")
        if scaling == 0 and bool(exact.any()):
            raise UnsupportedError("a bias difference under a scaling of 0", tensor=name)
        stored = rounded(exact / (scaling or 1.0), code)
        self.errors[name] = relative(read_tensor(stored, exact.dtype) * scaling - exact, exact)
        return Full(diff=stored, scale=scaling)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        share = dict(zip(self.factored, shares([found.norm for found in self.factored.values()]), strict=True))
        for name, terms in self.terms.items():
            row: dict[str, Any] = {"name": name, "kind": self.deltas[name].kind, "adapters": len(terms)}
            found = self.factored.get(name)
            lows = [low.rank for delta, _, _ in terms if (low := low_of(delta)) is not None]
            kept = low_of(self.deltas[name])
            error = found.error / found.norm if found and found.norm else self.errors.get(name, 0.0)
            row |= {
                "rank_before": sum(lows) or None, "rank": kept.rank if kept else None, "error": error,
                "optimal_error": found.optimal / found.norm if found and found.norm else 0.0, "energy": max(0.0, 1 - error**2),
                "share": share.get(name),
            }  # fmt: skip
            rows.append(row)
        return rows


def summed(terms: Low, rank: int | None, code: str | None) -> Factored:
    """Σ wᵢ·ΔWᵢ as one LoRA: alone its own factors, else the exact concatenation or the core's, whichever is nearer as stored."""
    if len(terms) == 1:
        return _alone(*terms[0], rank, code)
    lows = [low for low, _ in terms]
    known, noise = known_of(terms)
    written = code or ("F64" if widest(lows) == "F64" else "F32")
    layer = next((low.layer for low in lows if low.layer != "unknown"), "unknown")
    style = Style(code=written, shape=lows[0].shape(), layer=layer)
    needed, whole = lossless_rank(known, noise, written), sum(low.rank for low in lows)
    found = truncated(known, min(rank or needed, needed), style)
    if needed == whole and (rank is None or rank >= whole):
        joined = replace(concatenated(terms, written), layer=layer)
        error = error_of(known, joined)
        if error < found.error:
            return replace(found, delta=joined, error=error, optimal=0.0)
    return found


def _alone(low: LowRank, weight: float, rank: int | None, code: str | None) -> Factored:
    """One LoRA: its alpha takes the weight, its factors keep their bytes unless another rank or dtype is asked for."""
    import torch

    scaled = replace(low, alpha=low.alpha * weight)
    if scaled.alpha < 0:  # a sign goes into B exactly; readers take an alpha below 0 for none
        scaled = replace(scaled, alpha=-scaled.alpha, B=rounded(-read_tensor(low.B, torch.float64), low.B.spec.dtype))
    if rank is not None and rank < low.rank:
        known, _ = known_of([(scaled, 1.0)])
        return truncated(known, rank, style_of(scaled, code))
    if code is None or {low.A.spec.dtype, low.B.spec.dtype} == {code}:
        norm = scaled.norm()
        if not math.isfinite(norm):
            raise NonFiniteError("a factor holds inf or nan")
        return Factored(delta=scaled, norm=norm, error=0.0, optimal=0.0, method="kept")
    known, _ = known_of([(scaled, 1.0)])
    cast = replace(scaled, A=recast(low.A, code), B=recast(scaled.B, code))
    return Factored(delta=cast, norm=scaled.norm(), error=error_of(known, cast), optimal=0.0, method="kept")


def _sum(terms: Sequence[tuple[Full, float]]) -> Tensor:
    import torch

    total = torch.zeros(terms[0][0].shape(), dtype=torch.float64)
    for delta, weight in terms:
        total += read_tensor(delta.diff, torch.float64) * (delta.scale * weight)
    return total


def _fault(terms: Terms) -> LoratoolsError | None:
    """Why a tensor's deltas have no sum that an adapter can say, if they have none."""
    kinds = list(dict.fromkeys(delta.kind for delta, _, _ in terms))
    if any(delta.kind == "dora" or (isinstance(delta, Chain) and isinstance(delta.then, DoRA)) for delta, _, _ in terms):
        if len(terms) == 1 and terms[0][1] == 1:
            return None
        return UnsupportedError(
            "DoRA is no difference that could be scaled or summed: W' depends on the base",
            remedy="merge the adapters into the base, and extract the result",
        )  # fmt: skip
    first = terms[0][0]
    if all(isinstance(delta, Replacement) for delta, _, _ in terms):
        return _saved_fault(terms)
    if len(kinds) > 1 or not isinstance(first, LowRank | Full):
        if len(terms) == 1 and terms[0][1] == 1:
            return None
        return MatchError("deltas of these kinds have no sum", found=", ".join(kinds))
    shapes = list(dict.fromkeys(delta.shape() for delta, _, _ in terms if isinstance(delta, LowRank | Full)))
    if len(shapes) > 1:
        return ShapeError("the adapters change weights of different shapes", found=list(shapes[1]), expected=list(shapes[0]))
    layers = {delta.layer for delta, _, _ in terms if isinstance(delta, LowRank)} - {"unknown"}
    if len(layers) > 1:
        return MatchError("the adapters take this weight for different layers", found=", ".join(sorted(layers)))
    return None


def _saved_fault(terms: Terms) -> LoratoolsError | None:
    """A saved tensor takes the weight's place: W + Σ wᵢ(V − W) is V where the weights sum to 1, and needs the base elsewhere."""
    values = [delta.value for delta, _, _ in terms if isinstance(delta, Replacement)]
    if not all(same_bytes(values[0], other) for other in values[1:]):
        remedy = "merge the adapters into the base instead, or remove it from all but one"
        return MatchError("several adapters save this tensor whole, and not the same", remedy=remedy)
    weights = [weight for _, weight, _ in terms]
    if sum(weights) == 1 or all(weight == 1 for weight in weights):
        return None
    remedy = "merge takes the base and a strength"
    return UnsupportedError("a tensor saved whole has weight 1", found=", ".join(f"{weight:g}" for weight in weights), remedy=remedy)
