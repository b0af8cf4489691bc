"""‖W + s·B·A‖ for each row, without the product: the norm by which DoRA divides (Liu et al. 2024, arXiv:2402.09353, §4.3).

    ‖w + s·bA‖² = ‖w‖² + 2s·⟨w·Aᵀ, b⟩ + s²·⟨b·(A·Aᵀ), b⟩

costs one pass over W and r columns instead of a dense product and three tensors of W's size. It loses digits where s·bA is
close to −w, so such rows are computed from W + s·B·A itself. ‖W‖² is taken anew each time: W·Aᵀ reads the same rows, so it
costs little, and a value kept from before could not see a weight that was written through `.data`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.layers import _fused
from loratools.layers.base import widest

LOST = 0.01  # below twice this share of ‖w‖² a row has lost two of its seven digits and is computed densely
_WIDE_SUMS = "out_dtype" in (torch.mm.__doc__ or "")  # torch 2.8 and later, on CUDA
BLOCK = 1 << 22  # elements of W widened at once: 16 MB in float32


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """‖W + scaling·B·A‖ per row, (m,), for W (m, n), A (r, n), B (m, r) of any floating dtypes; no gradient.

    In float32, or float64 where W is; never in TF32 or an autocast dtype.

    >>> row_norms(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0]]), 1.0)
    tensor([5.])
    """
    arguments = (W.detach(), A.detach(), B.detach(), scaling)
    if torch.compiler.is_compiling():  # the rows to repeat depend on values, which a traced graph cannot ask for
        return torch.ops.loratools.row_norms(*arguments)  # type: ignore[no-any-return]
    return _row_norms(*arguments)


@torch.no_grad()
def _row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    with torch.autocast(W.device.type, enabled=False):
        if _fused.usable(W, A, B, rank=len(A)):
            return _fused.row_norms(W, A, B, scaling, LOST)
        wide = torch.promote_types(W.dtype, torch.float32)
        inner = _product_dtype(W, wide)
        A, B = A.to(inner), B.to(inner)
        own, inner_products = _with_base(W, A, wide)
        # ⟨2s·w·Aᵀ + s²·b·(A·Aᵀ), b⟩, both terms in one pass: on a GPU it is the number of kernels that costs
        change = torch.addmm(inner_products, B, A @ A.T, beta=2 * scaling, alpha=scaling * scaling).mul_(B).sum(1)
        total = own + change.to(wide)
        rows = _lost(total, own)
        if rows is not None:
            _repeat(total, rows, W, A, B, scaling)
        return total.clamp_min_(0).sqrt_()


def _product_dtype(W: Tensor, wide: torch.dtype) -> torch.dtype:
    """The dtype to multiply in: where float32 products may be made in TF32, the next wider."""
    shortened = W.is_cuda and wide is torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return torch.float64 if shortened else wide


def _with_base(W: Tensor, A: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(‖w‖², w·Aᵀ) per row; W is widened in blocks, or by the GPU's own bfloat16 products, which are summed in float32."""
    if W.is_cuda and W.dtype is torch.bfloat16 and A.dtype is torch.float32 and _WIDE_SUMS:
        return torch.linalg.vector_norm(W, dim=1, dtype=wide).square_(), _split_product(W, A)
    if W.dtype == A.dtype:
        return torch.linalg.vector_norm(W, dim=1).square_(), W @ A.T
    step = max(1, BLOCK // max(1, W.shape[1]))
    own, products = W.new_empty(len(W), dtype=wide), W.new_empty(len(W), len(A), dtype=A.dtype)
    for start in range(0, len(W), step):
        part = slice(start, start + step)
        block = W[part].to(A.dtype)
        own[part] = torch.linalg.vector_norm(block, dim=1).square_()
        torch.mm(block, A.T, out=products[part])
    return own, products


def _split_product(W: Tensor, A: Tensor) -> Tensor:
    """W·Aᵀ in float32 from bfloat16 factors: A as the sum of two, 16 bits of it, one part in 10⁷ of a norm where ΔW is a tenth of W."""
    high = A.to(torch.bfloat16)
    low = (A - high).to(torch.bfloat16)
    both = torch.mm(W, torch.cat([high, low]).T, out_dtype=torch.float32)
    return both[:, : len(A)] + both[:, len(A) :]


def _lost(total: Tensor, own: Tensor) -> Tensor | None:
    """The rows whose norm is a small difference of large numbers, ‖w‖² and as much taken from it; None for none."""
    if total.is_cuda and torch.cuda.is_current_stream_capturing():  # a CUDA graph cannot wait for the answer: all rows
        return torch.arange(len(total), device=total.device)
    lost = ~(total >= 2 * LOST * own)
    return lost.nonzero().squeeze(1) if bool(lost.any()) else None


def _repeat(total: Tensor, rows: Tensor, W: Tensor, A: Tensor, B: Tensor, scaling: float) -> None:
    """Write the squared norms of some rows as they come from W + scaling·B·A itself, wide: what is left of them is small."""
    A, B = A.to(widest(W)), B.to(widest(W))
    for some in torch.split(rows, max(1, BLOCK // max(1, W.shape[1]))):
        dense = torch.addmm(W[some].to(A.dtype), B[some], A, alpha=scaling)
        total[some] = torch.linalg.vector_norm(dense, dim=1).square_().to(total.dtype)


@torch.library.custom_op("loratools::row_norms", mutates_args=(), schema="(Tensor W, Tensor A, Tensor B, float scaling) -> Tensor")
def _opaque(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return _row_norms(W, A, B, scaling)


@_opaque.register_fake
def _shape(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return W.new_empty(W.shape[:1], dtype=torch.promote_types(W.dtype, torch.float32))
