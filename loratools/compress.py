"""ΔW known by its singular value decomposition, written again as factors of another rank; never as an m × n matrix.

Truncating the SVD of a product, or of a sum of products, is optimal (Eckart, Young 1936; Mirsky 1960). What is stated is the
error of the factors as they are stored, after the rounding to their dtype, beside the least that any factors of the rank leave.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.deltas.base import Additive, Delta
from loratools.deltas.lowrank import LowRank
from loratools.errors import NonFiniteError
from loratools.factors import FLOOR, Factored, range_shift
from loratools.refs import InMemory, Ref, Spec
from loratools.rounding import Rounding
from loratools.tensors import read_tensor, to_ref, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.product import Triple

_BELOW = {"F64": 2.0**-53}  # of ‖ΔW‖: what a lossless rank may drop, by dtype
_BELOW_F32 = 2.0**-27  # a fifth of what rounding factors to float32 adds, 3.6e-8 ≈ 2**-24.7, and less for narrower dtypes
_NOISE = 2.0**-49  # of Σ‖bₖ‖‖aₖ‖: float64's own rounding in QR and SVD


@dataclass(frozen=True, kw_only=True)
class Style:
    """How factors are written: dtype by its code, the weight's shape and layer, and the scaling they are divided by."""

    code: str
    shape: tuple[int, ...]
    layer: str
    scaling: float = 1.0
    rslora: bool = False


def style_of(low: LowRank, code: str | None = None) -> Style:
    """The style a LoRA is written in: its own scaling, the wider of its dtypes."""
    return Style(code=code or widest([low]), shape=low.shape(), layer=low.layer, scaling=low.scaling, rslora=low.rslora)


def widest(deltas: Sequence[Delta]) -> str:
    """The narrowest dtype that holds all of their tensors' numbers.

    bfloat16 and float16 meet in float32, as each has numbers that the other lacks.
    """
    codes = {ref.spec.dtype for delta in deltas for ref in delta.refs().values()}
    return "F64" if "F64" in codes else codes.pop() if len(codes) == 1 else "F32"


def as_low(delta: Additive, shape: tuple[int, ...]) -> LowRank | None:
    """A change of a weight of that shape as a LoRA, float64 factors and scaling 1; None where it is no small product that is known."""
    if isinstance(delta, LowRank):
        return delta
    found = delta.product()
    if found is None:
        return None
    B, A = found
    layer = "unknown" if len(shape) == 2 else "conv"
    return LowRank(B=to_ref(B), A=to_ref(A.reshape(len(A), *shape[1:])), alpha=float(len(A)), layer=layer)


def known_of(terms: Sequence[tuple[LowRank, float]]) -> tuple[Triple, float]:
    """The SVD of Σ wᵢ·ΔWᵢ, and the largest singular value that float64's rounding alone may have left in it."""
    import torch

    from loratools.linalg.product import sum_svd

    parts = [(*low.factors(), low.scaling * weight) for low, weight in terms]
    size = sum(abs(scale) * float(torch.linalg.vector_norm(B, dim=0) @ torch.linalg.vector_norm(A, dim=1)) for B, A, scale in parts)
    return sum_svd(parts), _NOISE * size


def lossless_rank(known: Triple, noise: float, code: str) -> int:
    """The least rank, at least 1, that drops nothing a file of this dtype could show.

    >>> import torch
    >>> from loratools.linalg.product import product_svd
    >>> twice = product_svd(torch.ones(3, 2), torch.ones(2, 4))
    >>> lossless_rank(twice, 1e-14, "F32")
    1
    """
    import torch

    S = torch.where(noise < known.S, known.S, 0.0)
    tails = S.flip(0).square().cumsum(0).flip(0).sqrt()  # tails[r]: the error of rank r
    return max(1, int((tails > _BELOW.get(code, _BELOW_F32) * float(torch.linalg.vector_norm(S))).sum()))


def truncated(known: Triple, rank: int, style: Style) -> Factored:
    """The best factors of a rank, balanced and rounded once, with their error as stored; a rank beyond ΔW's is zeros.

    A float16 range too short for balanced factors moves a power of two into alpha. Raises NonFiniteError where a factor still
    is not finite.
    """
    import torch

    root = (known.S[:rank] / abs(style.scaling or 1.0)).sqrt()
    B, A = known.U[:, :rank] * (root * math.copysign(1.0, style.scaling)), root.unsqueeze(1) * known.Vh[:rank]
    shift = range_shift(B, A) if style.code == "F16" else 0
    stored = [rounded(X * 2.0**shift, style.code) for X in (B, A)]
    scaling = style.scaling * 4.0**-shift
    low = LowRank(
        B=stored[0], A=stored[1].reshape(root.numel(), *style.shape[1:]), alpha=alpha_for(scaling, root.numel(), style.rslora),
        rslora=style.rslora, layer=style.layer,
    )  # fmt: skip
    low = padded(low, rank)
    norm, optimal = (float(torch.linalg.vector_norm(part)) for part in (known.S, known.S[rank:]))
    return Factored(delta=low, norm=norm, error=max(optimal, error_of(known, low)), optimal=optimal, method="core")


def within(known: Triple, noise: float, limit: float, style: Style, most: int) -> Factored | None:
    """The least rank below `most` whose error as stored is within limit · ‖ΔW‖; None where there is none."""
    import torch

    from loratools.linalg.ranks import for_error

    norm, goal = float(torch.linalg.vector_norm(known.S)), max(limit, FLOOR)
    last = min(lossless_rank(known, noise, style.code), most)
    rank = max(1, min(for_error(known.S, norm**2, fraction=goal), last)) if norm else 1
    while rank < most:
        found = truncated(known, rank, style)
        if found.error <= (goal + FLOOR) * norm:
            return found
        if rank >= last:
            break
        # what rounding added is as good as orthogonal to what the truncation left
        added = (found.error**2 - found.optimal**2) / norm**2
        wanted = math.sqrt(max(0.0, goal**2 - added))
        rank = max(rank + 1, min(for_error(known.S, norm**2, fraction=wanted) if wanted > 0 else last, last))
    return None


def error_of(known: Triple, low: LowRank) -> float:
    """‖ΔW − scaling·B·A‖ of a LoRA as it is stored."""
    from loratools.linalg.product import against

    return against(known, *low.factors(), scale=low.scaling).distance


def concatenated(terms: Sequence[tuple[LowRank, float]], code: str) -> LowRank:
    """Σ wᵢ·ΔWᵢ as one LoRA with scaling 1: all rows of the As beside each other, each B times its weight and scaling."""
    import torch

    pairs = [(B * (low.scaling * weight), A) for low, weight in terms for B, A in (low.factors(),)]
    B, A = torch.cat([B for B, _ in pairs], dim=1), torch.cat([A for _, A in pairs])
    shape, layer = terms[0][0].shape(), terms[0][0].layer
    return LowRank(B=rounded(B, code), A=rounded(A, code).reshape(len(A), *shape[1:]), alpha=float(len(A)), layer=layer)


def padded(low: LowRank, rank: int) -> LowRank:
    """The same ΔW at a greater rank: rows and columns of zeros, and alpha moved so that the scaling stays."""
    more = rank - low.rank
    if more <= 0:
        return low
    A, B = read_tensor(low.A), read_tensor(low.B)
    A, B = _joined(A, A.new_zeros(more, *A.shape[1:]), 0), _joined(B, B.new_zeros(B.shape[0], more), 1)
    return replace(low, A=to_ref(A), B=to_ref(B), alpha=alpha_for(low.scaling, rank, low.rslora))


def _joined(one: Tensor, other: Tensor, axis: int) -> Tensor:
    import torch

    return torch.cat([one, other], dim=axis)


def alpha_for(scaling: float, rank: int, rslora: bool = False) -> float:
    """The alpha that gives a scaling at a rank, to the last bit where there is one.

    >>> alpha_for(0.7, 10), alpha_for(2.0, 16, rslora=True)
    (7.0, 8.0)
    """
    divisor = math.sqrt(rank) if rslora else rank
    near = scaling * divisor
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in candidates if alpha / divisor == scaling), near)


def rounded(wide: Tensor, code: str) -> Ref:
    """A float64 tensor rounded once to a dtype. Raises NonFiniteError where a finite number becomes infinite."""
    import torch

    out = torch.empty(wide.shape, dtype=torch_dtype(code))
    Rounding()(wide.contiguous(), out)
    if not bool(torch.isfinite(out).all()):
        if not bool(torch.isfinite(wide).all()):
            raise NonFiniteError("a factor holds inf or nan")
        raise NonFiniteError(f"a factor would not be finite in {str(out.dtype).removeprefix('torch.')}", remedy="give a wider --dtype")
    return to_ref(out)


def recast(ref: Ref, code: str) -> Ref:
    """A tensor in another dtype, rounded once; its own bytes where it has that dtype."""
    import torch

    return ref if ref.spec.dtype == code else rounded(read_tensor(ref, torch.float64), code)


def hollow(low: LowRank, rank: int, code: str) -> LowRank:
    """What a LoRA of another rank would be, for measuring a file that is not made yet: specs without data."""
    A, B = Spec(code, (rank, *low.A.spec.shape[1:])), Spec(code, (low.B.spec.shape[0], rank))
    return replace(low, A=InMemory(A, b""), B=InMemory(B, b""), alpha=alpha_for(low.scaling, rank, low.rslora))
