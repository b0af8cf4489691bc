"""Do merged weights act as the layers say? The change of the output, on random inputs, in float64.

For a weight W, its deltas and the merged weight M as stored, Gaussian inputs x give per output row i the error
eᵢ·x = (M·x − W·x)ᵢ − Σ s·(layer(x) − W·x)ᵢ, whose variance is ‖eᵢ‖². Rounding alone makes ‖eᵢ‖ at most
hᵢ = (Σⱼ (ulp(Mᵢⱼ)/2)²)^½, so over K inputs the mean of (eᵢ·x)² is at most hᵢ²·χ²_K/K. With K = 256, twice hᵢ² is passed with
probability below 1e-16, and a row that is off by 2·hᵢ stays below it with less than 1e-12: a correct merge never fails and
a fault of twice the bound of rounding always shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.layers.bridge import layer_of, plain_layer

SAMPLES = 256
LIMIT = 2.0  # of the squared bound
_PRECISION = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126), torch.float64: (53, -1022)}


def has_layer(delta: Delta) -> bool:
    """Whether a layer can be made of the delta: LoRA of a known kind, and DoRA but for convolutions of one or three dimensions."""
    direction = delta.direction if isinstance(delta, DoRA) else delta
    if not isinstance(direction, LowRank) or direction.layer == "unknown":
        return False
    return not (isinstance(delta, DoRA) and direction.layer == "conv") or len(direction.shape()) == 4


def disagreement(W: Tensor, merged: Tensor, applications: Sequence[tuple[Delta, float]], *, seed: int = 0) -> tuple[float, int]:
    """The largest mean squared error of a row over its squared bound, and that row; a correct merge stays below LIMIT.

    `W` and `merged` are as stored, of one shape, on one device; deltas come with their strengths.
    """
    direction = applications[0][0]
    low = direction.direction if isinstance(direction, DoRA) else direction
    assert isinstance(low, LowRank)
    wide, after = W.to(torch.float64), merged.to(torch.float64)
    stored = low.layer == "transposed"
    x = _inputs(W.T if stored else W, low.layer, seed)
    with torch.no_grad():
        plain = plain_layer(wide.T.contiguous() if stored else wide, low.layer)
        y = plain(x)
        expected = torch.zeros_like(y)
        for delta, strength in applications:
            layer = layer_of(wide, delta).to(device=W.device, dtype=torch.float64).eval()
            expected += strength * (layer(x) - y)
        found = plain_layer(after.T.contiguous() if stored else after, low.layer)(x) - y
    error, size = found - expected, expected
    half = _half_ulp(merged)
    if low.layer == "embedding":
        squares, bound, extent = error.square().sum(1), half.square().sum(1), size.square().sum(1)
    else:
        rows = (half.T if stored else half).flatten(1)
        flat, change = error.reshape(SAMPLES, -1), size.reshape(SAMPLES, -1)
        squares, bound, extent = flat.square().mean(0), rows.square().sum(1), change.square().mean(0)
    # what the merge's own product may be off by, 2**-24 of the change (linalg.exact), and float64's sums over the row
    slack = extent * 2.0**-46 + (y.square().mean(0 if low.layer != "embedding" else 1).reshape(-1)) * 2.0**-90
    ratio = squares / (bound + slack).clamp_min(torch.finfo(torch.float64).tiny)
    ratio = torch.where(torch.isfinite(ratio), ratio, torch.inf)
    worst = int(ratio.argmax())
    return float(ratio[worst]), worst


def _inputs(weight: Tensor, layer: str, seed: int) -> Tensor:
    """K Gaussian inputs of one position each; for an embedding every row is looked up, once."""
    if layer == "embedding":
        return torch.arange(len(weight), device=weight.device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, *weight.shape[1:], generator=generator, dtype=torch.float64).to(weight.device)


def _half_ulp(merged: Tensor) -> Tensor:
    """Half the distance between neighbours around each stored value, in float64."""
    bits, lowest = _PRECISION.get(merged.dtype, (_fp8_bits(merged.dtype), -math.inf))
    exponent = torch.frexp(merged.to(torch.float64)).exponent - 1
    exponent = exponent.clamp_min(int(lowest)) if math.isfinite(lowest) else exponent
    return torch.ldexp(torch.ones_like(merged, dtype=torch.float64), exponent - bits)


def _fp8_bits(dtype: torch.dtype) -> int:
    return 4 if dtype == torch.float8_e4m3fn else 3
