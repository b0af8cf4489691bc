"""A dense difference as a LowRank: which low-rank form a tensor can take, and its factors as they will be written.

B (out, rank) and A (rank, in, *kernel) are balanced, √σ on both sides, in the dtype asked for; the error is measured with
the factors as they are then. A weight that is stored transposed, or belongs to an embedding, is approximated as it is
stored: a format turns the factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.lowrank import LowRank
from loratools.errors import NonFiniteError
from loratools.families import Family
from loratools.refs import Spec
from loratools.tensors import to_ref, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.svd import RankRule, Truncated

_BLOCK = 1 << 18  # elements of a row block while an error is measured
FLOOR = 1e-7  # of ‖D‖: errors below are working precision of float32 factors, and no rank is asked to beat it
_FEW = 2.0**-10  # of a component's root mean square in float16: above, subnormals (below 2⁻¹⁴) do not matter


def form_of(name: str, spec: Spec, family: Family) -> tuple[str | None, str]:
    """The layer whose LoRA a tensor can take (`linear`, `embedding`, `transposed`, `conv`), or None and the reason.

    >>> form_of("model.norm.weight", Spec("F32", (8,)), Family({}))
    (None, 'not a matrix')
    """
    dimensions = len(spec.shape)
    if not spec.floating:
        return None, "not floating point"
    if dimensions < 2:
        return None, "not a matrix"
    if not name.endswith(".weight"):
        return None, "a bare parameter: low-rank deltas are those of a module's weight"
    if dimensions == 2:
        return ("embedding" if family.embedding(name) else "transposed" if family.transposed(name) else "linear"), ""
    if family.stacked(name, spec.shape):
        return None, "a stack of matrices, which plain LoRA cannot say"
    if dimensions > 5:
        return None, "neither a matrix nor a convolution"
    if spec.shape[1] == 1:
        # a depthwise convolution looks the same, and LoRA on a grouped convolution mixes channels that its weight does not
        return None, "a convolution of one channel a group"
    return "conv", ""


@dataclass(frozen=True, kw_only=True)
class How:
    """How factors are found and written: their dtype by its code, their alpha (the rank if None), and `truncated_svd`'s options."""

    code: str = "F32"
    alpha: float | None = None
    exact: bool = False
    tolerance: float = 1e-4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Factored:
    """A low-rank delta with what is known of it: ‖D‖, its error measured as written, a lower bound of the best, and the route."""

    delta: LowRank
    norm: float
    error: float
    optimal: float
    method: str


def factor(D: Tensor, rule: RankRule, how: How, *, shape: tuple[int, ...], layer: str, rounding: float = 0.0) -> Factored:
    """D (out, in·kernel) as a LowRank of a weight of `shape`; an alpha that is not the rank is made up for in the factors.

    `rounding` bounds how far D is from the difference it stands for: the bound of the best error is lowered by it. In float16 a
    power of two moves from the factors into alpha where they would be subnormal or overflow. Raises NonFiniteError when a
    factor is not finite in its dtype.

    >>> import torch
    >>> found = factor(torch.outer(torch.ones(3), torch.ones(2)), 1, How(), shape=(3, 2), layer="linear")
    >>> found.delta.rank, found.delta.alpha, found.error < 1e-6
    (1, 1.0, True)
    """
    import torch

    from loratools.linalg.svd import truncated_svd

    plain = how.alpha is None and how.code != "F16"
    dtype = torch_dtype(how.code) if plain else torch.float64
    found = truncated_svd(D, rule, tolerance=how.tolerance, exact=how.exact, seed=how.seed, dtype=dtype)
    rank = found.rank
    if plain:
        B, A, alpha, error = found.B, found.A, float(rank), found.error
    else:
        B, A, alpha = _written(found, how)
        error = residual_norm(D, B, A, alpha / rank)
    delta = LowRank(A=to_ref(A).reshape(rank, *shape[1:]), B=to_ref(B), alpha=alpha, layer=layer)
    return Factored(delta=delta, norm=found.norm, error=error, optimal=max(0.0, found.optimal - rounding), method=found.method)


def reach(D: Tensor, fraction: float, how: How, *, shape: tuple[int, ...], layer: str, rounding: float = 0.0) -> Factored | None:
    """The least rank whose error, as written, is at most fraction · ‖D‖; None where no rank of factors in this dtype gets there.

    Rounding the factors adds to the error of the truncation, so the rank is chosen again with that much less to spend.
    """
    from loratools.linalg.svd import MaxError

    goal = max(fraction, FLOOR)
    limit = goal
    for _ in range(3):
        found = factor(D, MaxError(min(limit, 1 - FLOOR)), how, shape=shape, layer=layer, rounding=rounding)
        if found.error <= (goal + FLOOR) * found.norm:
            return found
        # the truncation used at most `limit` of ‖D‖; what rounding added is as good as orthogonal to it
        added = (found.error / found.norm) ** 2 - limit**2
        limit = math.sqrt(max(0.0, goal**2 - 1.05 * added))
        if limit < FLOOR or found.delta.rank == min(D.shape):
            return None
    return None


def _written(found: Truncated, how: How) -> tuple[Tensor, Tensor, float]:
    """B, A in the dtype and their alpha, from float64 factors whose scaling is 1."""
    import torch

    rank, dtype = found.rank, torch_dtype(how.code)
    B, A, alpha = found.B, found.A, float(rank)
    if how.alpha is not None:
        root = math.sqrt(rank / how.alpha)
        B, A, alpha = B * root, A * root, how.alpha
    elif shift := range_shift(B, A):
        B, A, alpha = B * 2.0**shift, A * 2.0**shift, rank * 4.0**-shift
    B, A = B.to(dtype).contiguous(), A.to(dtype).contiguous()
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        remedy = "give a wider --dtype, or no --alpha"
        raise NonFiniteError(f"a factor would not be finite in {str(dtype).removeprefix('torch.')}", remedy=remedy)
    return B, A, alpha


def range_shift(B: Tensor, A: Tensor) -> int:
    """The power of two that brings the largest entry to [1/2, 1), if float16 is short of range as it is; else 0."""
    import torch

    columns = torch.cat([B.square().mean(0), A.square().mean(1)]).sqrt()
    columns = columns[columns > 0]
    largest = max(float(B.abs().max()), float(A.abs().max()))
    if not columns.numel() or (float(columns.min()) > _FEW and largest < 2.0**15):
        return 0
    return -math.frexp(largest)[1]


def residual_norm(D: Tensor, B: Tensor, A: Tensor, scale: float = 1.0) -> float:
    """‖D − scale·B·A‖_F in float64, by blocks of rows."""
    import torch

    B, A = B.to(torch.float64), A.to(torch.float64) * scale
    step, total = max(1, _BLOCK // max(1, D.shape[1])), 0.0
    for start in range(0, len(D), step):
        rows = D[start : start + step].to(torch.float64, copy=True)
        total += float(rows.addmm_(B[start : start + step], A, alpha=-1).square().sum())
    return math.sqrt(total)
