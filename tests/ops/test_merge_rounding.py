"""merge rounds once: each written weight is within half a unit in the last place of a float64 oracle, nearly always.

The oracle is this file's own algebra on numpy arrays; the adapters are peft's files, written by hand. Each case holds more
than a million weights, 128 thousand of every kind of layer, so that one in ten thousand is a hundred of them.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools import merge
from loratools.rounding import Rounding
from tests.files import peft_config, read_checkpoint, write_adapter, write_checkpoint

ALPHA = 6.0
# module: (shape of its stored weight, kind of layer)
LAYERS: dict[str, tuple[tuple[int, ...], str]] = {
    "linear": ((320, 400), "linear"),
    "conv1d": ((320, 400), "transposed"),
    "embedding": ((2000, 64), "embedding"),
    "conv1": ((128, 250, 4), "conv"),
    "conv2": ((64, 125, 4, 4), "conv"),
    "point2": ((320, 400, 1, 1), "conv"),
    "conv3": ((32, 80, 5, 2, 5), "conv"),
    "point3": ((320, 400, 1, 1, 1), "conv"),
}
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def half_ulps(oracle: np.ndarray, mantissa: int) -> np.ndarray:
    """Half a unit in the last place of each value, in a format of that many stored bits."""
    _, exponent = np.frexp(oracle)
    return np.ldexp(1.0, exponent - 2 - mantissa)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.to(torch.float64).numpy()


def factors(shape: tuple[int, ...], kind: str, rank: int, generator: torch.Generator, size: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """peft's tensors of one module, their product of about `size` in each element."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * math.sqrt(size / math.sqrt(rank))).to(dtype)

    if kind == "embedding":
        return {"lora_embedding_A": random(rank, shape[0]), "lora_embedding_B": random(shape[1], rank)}
    out, inner = (shape[1], shape[:1]) if kind == "transposed" else (shape[0], shape[1:])
    return {"lora_A.weight": random(rank, *inner), "lora_B.weight": random(out, rank, *(1,) * (len(shape) - 2))}


def difference(tensors: dict[str, Tensor], kind: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """scale·ΔW as it is added to the stored weight."""
    A, B = (wide(tensor) for tensor in tensors.values())
    if kind == "embedding":
        return scale * (B @ A).T
    product = scale * (B.reshape(B.shape[0], -1) @ A.reshape(A.shape[0], -1))
    return product.T if kind == "transposed" else product.reshape(shape)


def norms(V: np.ndarray, kind: str) -> np.ndarray:
    """‖V‖ along what DoRA takes as one unit: an output, or a dimension of the embedding."""
    if kind in ("embedding", "transposed"):
        return np.sqrt((V * V).sum(axis=0, keepdims=True))
    return np.sqrt((V * V).sum(axis=tuple(range(1, V.ndim)), keepdims=True))


def stored_magnitude(m: np.ndarray, kind: str, shape: tuple[int, ...]) -> Tensor:
    """In peft's shape."""
    flat = torch.from_numpy(m.reshape(-1)).float()
    return flat.reshape(1, shape[0], *(1,) * (len(shape) - 2)) if kind == "conv" else flat


CASES = [
    *((torch.bfloat16, kind, ratio, 4) for kind in ("lora", "rslora", "dora") for ratio in (1e-3, 1e-2, 1.0)),
    *((dtype, kind, 1e-2, 4) for dtype in (torch.float16, torch.float32) for kind in ("lora", "rslora", "dora")),
    *((dtype, "lora", 1.0, rank) for dtype in (torch.bfloat16, torch.float16, torch.float32) for rank in (64, 256)),
]


@pytest.mark.parametrize(("dtype", "adaptation", "ratio", "rank"), CASES)
def test_half_a_unit_in_the_last_place(tmp_path: Path, dtype: torch.dtype, adaptation: str, ratio: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scale = ALPHA / math.sqrt(rank) if adaptation == "rslora" else ALPHA / rank
    base, tensors, oracle = {}, {}, {}
    for module, (shape, kind) in LAYERS.items():
        W = torch.randn(shape, generator=generator).to(dtype)
        low = factors(shape, kind, rank, generator, ratio / scale, dtype if module == "linear" else torch.float32)
        expected = wide(W) + difference(low, kind, shape, scale)
        if adaptation == "dora":
            start = norms(wide(W), kind)
            stored = stored_magnitude(start * (1 + ratio * np.random.default_rng(0).standard_normal(start.shape)), kind, shape)
            low["lora_magnitude_vector"] = stored
            expected = wide(stored).reshape(start.shape) * expected / norms(expected, kind)
        base[f"{module}.weight"], oracle[f"{module}.weight"] = W, expected
        tensors |= {f"base_model.model.{module}.{key}": tensor for key, tensor in low.items()}
    config = peft_config(
        r=rank, lora_alpha=ALPHA, use_rslora=adaptation == "rslora", use_dora=adaptation == "dora", target_modules=list(LAYERS)
    )
    write_checkpoint(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", tensors, config)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=["none"])
    merged = read_checkpoint(tmp_path / "out")
    for name, expected in oracle.items():
        assert merged[name].dtype == dtype and merged[name].numel() >= 100_000
        away = np.abs(wide(merged[name]) - expected)
        beyond = float((away > half_ulps(expected, MANTISSA[dtype])).mean())
        assert beyond <= 1e-4, (name, beyond)
        size = float(np.linalg.norm(expected - wide(base[name])) / np.linalg.norm(wide(base[name])))
        assert 0.5 * ratio < size < 2 * ratio  # the case is the one it says it is


def test_the_measure_sees_a_second_rounding() -> None:
    """Rounding ΔW before it is added, as plain bfloat16 arithmetic does, is beyond half a unit far more often."""
    generator = torch.Generator().manual_seed(0)
    W, D = torch.randn(400, 400, generator=generator).bfloat16(), torch.randn(400, 400, generator=generator) * 0.01
    exact = wide(W) + wide(D)

    def beyond(found: Tensor) -> float:
        return float((np.abs(wide(found) - exact) > half_ulps(exact, 7)).mean())

    assert beyond(W + D.bfloat16()) > 1e-3
    once = torch.empty_like(W)
    Rounding()(torch.from_numpy(exact), once)
    assert beyond(once) == 0
