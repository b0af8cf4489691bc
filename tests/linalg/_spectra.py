"""Matrices with spectra written out, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def orthonormal(m: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]


def with_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A float32 matrix (m, n) with these singular values, to float32 rounding."""
    generator = torch.Generator().manual_seed(seed)
    k = sigma.numel()
    return ((orthonormal(m, k, generator) * sigma.double()) @ orthonormal(n, k, generator).T).float()


def repeated(*runs: tuple[int, float]) -> Tensor:
    return torch.cat([torch.full((count,), value, dtype=torch.float64) for count, value in runs])


def spectra(k: int) -> Iterator[tuple[str, Tensor]]:
    """Names and singular values: steep, flat, exactly low-rank, few distinct, stepped."""
    index = torch.arange(1, k + 1, dtype=torch.float64)
    yield "power 1/2", index**-0.5
    yield "power 2", index**-2.0
    yield "geometric 0.99", 0.99**index
    yield "geometric 0.5", 0.5**index
    yield "flat", torch.ones(k, dtype=torch.float64)
    yield "rank 8", torch.linspace(1, 0.1, 8, dtype=torch.float64)
    yield "rank 32, condition 1e4", torch.logspace(0, -4, 32, dtype=torch.float64)
    yield "rank 100, condition 1e6", torch.logspace(0, -6, 100, dtype=torch.float64)
    yield "three distinct", repeated((40, 1.0), (100, 0.5), (k - 140, 0.1))
    yield "two close", repeated((9, 1.0), (200, 0.999), (k - 209, 0.01))
    yield "step after 33", repeated((33, 1.0), (k - 33, 1e-3))


def difference(m: int, n: int, seed: int = 0) -> Tensor:
    """A fine-tune in bf16 of a random bf16 weight: 64 directions falling as k**-0.7, and noise."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(m, n, generator=generator)).bfloat16()
    rank = min(64, m, n)
    sigma = 0.3 * torch.arange(1, rank + 1).float() ** -0.7
    left, right = torch.randn(m, rank, generator=generator) / m**0.5, torch.randn(rank, n, generator=generator) / n**0.5
    change = (left * sigma) @ right + 2e-5 * torch.randn(m, n, generator=generator)
    return (base.float() + change).bfloat16().float() - base.float()
