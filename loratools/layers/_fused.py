"""DoRA's row norms and gain on a CUDA device, each in few Triton kernels; `_norms` and `_dora` tell what they compute.

Plain torch takes a dozen small kernels for the norms and has to ask the device which rows to repeat; here nothing waits. Triton
comes with torch's CUDA builds; where it is missing, or cannot compile, the plain way is taken.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

SPLITS = 2048  # programs to have at least, so that a GPU is full
if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _sums(  # type: ignore[no-untyped-def]
        W, A, squares, products, grams, m, n, r, wm, wn, am, an, span,
        R: tl.constexpr, M: tl.constexpr, K: tl.constexpr, HALVES: tl.constexpr,
    ):  # fmt: skip
        """‖w‖² and w·Aᵀ over the columns of one span; the last program of a span has A·Aᵀ. A of bfloat16 W goes as the sum of two."""
        rows = tl.program_id(0) * M + tl.arange(0, M)
        part, ranks = tl.program_id(1), tl.arange(0, R)
        stop = tl.minimum(part * span + span, n)
        if tl.program_id(0) * M >= m:
            gram = tl.zeros((R, R), tl.float32)
            for start in range(part * span, stop, K):
                at = start + tl.arange(0, K)
                a = tl.load(A + ranks[:, None] * am + at[None, :] * an, (ranks[:, None] < r) & (at[None, :] < n), 0.0).to(tl.float32)
                gram = tl.dot(a, tl.trans(a), gram, input_precision="ieee")
            tl.store(grams + part * R * R + ranks[:, None] * R + ranks[None, :], gram)
        else:
            own, product = tl.zeros((M,), tl.float32), tl.zeros((M, R), tl.float32)
            for start in range(part * span, stop, K):
                at = start + tl.arange(0, K)
                w = tl.load(W + rows[:, None].to(tl.int64) * wm + at[None, :] * wn, (rows[:, None] < m) & (at[None, :] < n), 0.0)
                a = tl.load(A + ranks[None, :] * am + at[:, None] * an, (ranks[None, :] < r) & (at[:, None] < n), 0.0).to(tl.float32)
                wide = w.to(tl.float32)
                own += tl.sum(wide * wide, 1)
                if HALVES:
                    high = a.to(tl.bfloat16)
                    product = tl.dot(w, high, product)
                    product = tl.dot(w, (a - high.to(tl.float32)).to(tl.bfloat16), product)
                else:
                    product = tl.dot(wide, a, product, input_precision="tf32x3")
            tl.store(squares + part * m + rows, own, rows < m)
            tl.store(products + (part * m + rows[:, None]).to(tl.int64) * R + ranks[None, :], product, rows[:, None] < m)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _finish(  # type: ignore[no-untyped-def]
        W, A, B, squares, products, grams, norms, m, n, r, wm, wn, am, an, bm, bn, scaling, parts,
        LEAST: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    ):  # fmt: skip
        """‖w + s·bA‖ from the sums of all spans; from w + s·bA itself, in float64, where it is a small difference of large numbers."""
        rows, ranks = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, R)
        own, product, gram = tl.zeros((M,), tl.float32), tl.zeros((M, R), tl.float32), tl.zeros((R, R), tl.float32)
        for part in range(parts):
            own += tl.load(squares + part * m + rows, rows < m, 0.0)
            product += tl.load(products + (part * m + rows[:, None]).to(tl.int64) * R + ranks[None, :], rows[:, None] < m, 0.0)
            gram += tl.load(grams + part * R * R + ranks[:, None] * R + ranks[None, :])
        there = (rows[:, None] < m) & (ranks[None, :] < r)
        b = tl.load(B + rows[:, None].to(tl.int64) * bm + ranks[None, :] * bn, there, 0.0).to(tl.float32)
        change = 2 * scaling * product + scaling * scaling * tl.dot(b, gram, input_precision="ieee")
        total = own + tl.sum(change * b, 1)
        lost = (rows < m) & ((total < 2 * LEAST * own) | (total != total))
        tl.store(norms + rows, tl.sqrt(tl.maximum(total, 0.0)), (rows < m) & ~lost)
        if tl.max(lost.to(tl.int32), 0) > 0:
            for turn in range(M):
                row = tl.program_id(0).to(tl.int64) * M + turn
                if tl.max((lost & (rows == row)).to(tl.int32), 0) > 0:
                    b64 = tl.load(B + row * bm + ranks * bn, ranks < r, 0.0).to(tl.float64)
                    dense = tl.zeros((K,), tl.float64)
                    for start in range(0, n, K):
                        at = start + tl.arange(0, K)
                        known = (ranks[:, None] < r) & (at[None, :] < n)
                        a = tl.load(A + ranks[:, None] * am + at[None, :] * an, known, 0.0).to(tl.float64)
                        v = tl.load(W + row * wm + at * wn, at < n, 0.0).to(tl.float64) + scaling * tl.sum(b64[:, None] * a, 0)
                        dense += v * v
                    tl.store(norms + row, tl.sqrt(tl.sum(dense, 0)).to(tl.float32))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _gained(z, gain, bias, y, tokens, n, HAS: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
        """gain∘z + bias, rounded once."""
        at, columns = tl.program_id(0) * T + tl.arange(0, T), tl.program_id(1) * N + tl.arange(0, N)
        there, place = (at[:, None] < tokens) & (columns[None, :] < n), at[:, None].to(tl.int64) * n + columns[None, :]
        made = tl.load(z + place, there, 0.0).to(tl.float32) * tl.load(gain + columns, columns < n, 0.0)[None, :]
        if HAS:
            made += tl.load(bias + columns, columns < n, 0.0).to(tl.float32)[None, :]
        tl.store(y + place, made, there)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _gained_back(g, z, gain, dz, dgain, tokens, n, TURNS: tl.constexpr, T: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
        """gain∘g, and Σ g∘z over the tokens of one program."""
        columns = tl.program_id(1) * N + tl.arange(0, N)
        factor = tl.load(gain + columns, columns < n, 0.0)
        total = tl.zeros((N,), tl.float32)
        for turn in range(TURNS):
            at = (tl.program_id(0) * TURNS + turn) * T + tl.arange(0, T)
            there, place = (at[:, None] < tokens) & (columns[None, :] < n), at[:, None].to(tl.int64) * n + columns[None, :]
            come = tl.load(g + place, there, 0.0).to(tl.float32)
            total += tl.sum(come * tl.load(z + place, there, 0.0).to(tl.float32), 0)
            tl.store(dz + place, come * factor[None, :], there)
        tl.store(dgain + tl.program_id(0) * n + columns, total, columns < n)


@cache
def compiles(device: int) -> bool:
    """Whether Triton is there, the device is Ampere or later, and a kernel can be compiled; a warning tells of one that cannot."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    probe = torch.ones(2, 2, device=f"cuda:{device}")
    try:
        gained(probe, probe[0], None)
    except Exception as error:  # a missing C compiler, a driver too old: Triton raises what it meets
        warnings.warn(f"DoRA layers take the slower way, since Triton cannot compile: {error}", stacklevel=2)
        return False
    return True


def usable(*tensors: Tensor, rank: int = 1) -> bool:
    """Whether tensors, the first on a CUDA device, can go through these kernels."""
    first = tensors[0]
    known = all(tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and tensor.device == first.device for tensor in tensors)
    return first.is_cuda and known and rank <= 64 and not torch.compiler.is_compiling() and compiles(first.device.index)


def row_norms(W: Tensor, A: Tensor, B: Tensor, scaling: float, least: float) -> Tensor:
    """‖W + scaling·B·A‖ per row in float32, (m,), for W (m, n), A (r, n), B (m, r); below twice the share `least` of ‖w‖² densely."""
    (m, n), r = W.shape, len(A)
    R, M, K = max(16, triton.next_power_of_2(r)), 32, 128
    blocks = triton.cdiv(m, M)
    span = K * max(1, triton.cdiv(n * blocks, SPLITS * K))
    parts = triton.cdiv(n, span)
    room = W.new_empty(parts * (m + m * R + R * R), dtype=torch.float32)
    sums = torch.split(room, [parts * m, parts * m * R, parts * R * R])
    norms, sizes, steps = W.new_empty(m, dtype=torch.float32), (m, n, r), (*W.stride(), *A.stride())
    with _on(W):
        _sums[(blocks + 1, parts)](W, A, *sums, *sizes, *steps, span, R, M, K, W.dtype is torch.bfloat16)
        _finish[(triton.cdiv(m, 16),)](W, A, B, *sums, norms, *sizes, *steps, *B.stride(), scaling, parts, least, R, 16, 128)
    return norms


def gained(z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """gain∘z + bias over the last axis, in z's dtype, with gradients of z and gain."""
    # laid out here, where autograd sees it: what a Function saves must be its own inputs for a gradient of the gradient
    laid = (z.contiguous(), gain.float().contiguous(), None if bias is None else bias.contiguous())
    made: Tensor = _Gained.apply(*laid)  # type: ignore[no-untyped-call]
    return made


class _Gained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, gain)
        y = torch.empty_like(z)
        tokens, n = z.numel() // max(1, z.shape[-1]), z.shape[-1]
        with _on(z):
            grid = (triton.cdiv(tokens, 16), triton.cdiv(n, 256))
            _gained[grid](z, gain, z if bias is None else bias, y, tokens, n, bias is not None, 16, 256)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        z, gain = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: in operations that have one
            return (g * gain).to(z.dtype), (g.float() * z.float()).flatten(0, -2).sum(0), None
        g, dz, n = g.contiguous(), torch.empty_like(z), z.shape[-1]
        tokens, turns = z.numel() // max(1, n), 8
        spans = triton.cdiv(tokens, 16 * turns)
        dgain = z.new_empty(spans, n, dtype=torch.float32)
        with _on(z):
            _gained_back[(spans, triton.cdiv(n, 128))](g, z, gain, dz, dgain, tokens, n, turns, 16, 128)
        return dz, dgain.sum(0), None


def _on(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
