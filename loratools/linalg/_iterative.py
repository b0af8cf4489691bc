"""The iterative route: grow a Krylov space until a certificate looks cheap, project in float64, certify, or give up."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from loratools.linalg._certificate import COLUMNS, FAILURE, Probe, Space, bound, largest_mu, project, threshold
from loratools.linalg._krylov import Krylov
from loratools.linalg._leading import Leading, split, tail
from loratools.linalg._operator import Operator
from loratools.linalg._rules import Fixed, Rule

NEGLIGIBLE = 1e-7  # of ‖X‖: an error float32 factors cannot reach, so nothing is left to certify
_PATIENCE = 6  # passes a probe may take however few were spent before
_BLIND = 1e-5  # of ‖X‖²: below, errors from float32 Ritz values are rounding noise


def block_size(rule: Rule) -> int:
    """Columns of a Krylov block: a few more than the rank, and few enough that orthogonalising stays cheap."""
    return min(48, rule.size + 8) if isinstance(rule, Fixed) else 32


def iterative(op: Operator, rule: Rule, *, tolerance: float, seed: int) -> Leading | None:
    """The leading part within `tolerance` of a certified bound, or None where that would cost more than the Gram route."""
    generator = torch.Generator().manual_seed(seed)
    block = block_size(rule)
    basis = Krylov(op, block, generator)
    attempts, next_look = 0, 0
    while basis.dim + 2 * block <= op.n // 2 and op.passes < op.n // 8:
        basis.extend()
        if basis.dim < next_look:
            continue
        theta, residual, Y = basis.ritz()
        j = _worth_a_look(op, rule, theta, residual, tolerance)
        if j is None:
            next_look = basis.dim + basis.dim // 8  # Ritz values of a large basis cost more than a block
            continue
        space = project(op, basis.Q.double() @ Y[:, :j].to(basis.Q.device))
        P, sigma, Q = split(op, space)
        rank = rule.rank(sigma, op.norm**2)
        error = tail(op.norm**2, sigma, rank)
        optimal = 0.0 if error <= NEGLIGIBLE * op.norm else None
        if optimal is None and rule.reached(sigma, op.norm**2):
            attempts += 1
            chance = FAILURE / 2**attempts
            optimal = _certify(op, space, theta, rank, wanted=error / (1 + tolerance), chance=chance, generator=generator)
        if optimal is not None:
            return Leading(P=P[:, :rank], sigma=sigma[:rank], Q=Q[:, :rank], optimal=optimal, expected=error, method="krylov")
        next_look = basis.dim + max(2 * block, basis.dim // 2)
    return None


def _worth_a_look(op: Operator, rule: Rule, theta: Tensor, residual: Tensor, tolerance: float) -> int | None:
    """How many Ritz vectors to keep if a certificate now would cost no more passes than were spent so far, else None.

    From float32 Ritz values and residuals, so a guess: a wrong one costs time, never truth.
    """
    sigma = (theta + residual.square() / theta.clamp_min(1e-300)).sqrt()
    rank = rule.rank(sigma, op.norm**2)
    squared = tail(op.norm**2, sigma, rank) ** 2
    if squared <= _BLIND * op.norm**2:
        return min(theta.numel(), 2 * rank + 8)
    if not rule.reached(sigma, op.norm**2):
        return None
    allowed = squared * (1 - (1 + tolerance) ** -2)
    mu = _guess_mu(theta[:rank], residual[:rank], sigma[:rank], allowed)
    passes = {j: 2 * _steps(op, mu, theta, residual, j) for j in _sizes(rank, theta.numel())}
    best = min(passes, key=lambda j: passes[j] + j / 6, default=None)  # six columns in float64 cost about a pass
    return best if best is not None and passes[best] <= max(_PATIENCE, op.passes) else None


def _guess_mu(theta: Tensor, residual: Tensor, sigma: Tensor, allowed: float) -> float:
    """The largest μ at which the 2×2 matrices [[θ, s], [s, μ]] exceed σ² by no more than `allowed` in sum."""
    t, s, limit = theta.numpy(), residual.numpy(), float(sigma.square().sum()) + allowed  # numpy: a tenth of torch's overhead
    low, high = 0.0, float(theta[0])
    for _ in range(16):
        mu = (low + high) / 2
        top = ((t + mu) / 2 + np.hypot((t - mu) / 2, s)).sum()
        low, high = (mu, high) if top <= limit else (low, mu)
    return low


def _sizes(rank: int, available: int) -> list[int]:
    """Numbers of Ritz vectors worth a try."""
    return sorted({j for j in (rank + 4, rank + 8, rank + 16, rank + 32, 2 * rank + 32, 3 * rank + 32) if j < available})


def _steps(op: Operator, mu: float, theta: Tensor, residual: Tensor, j: int) -> float:
    """Lanczos steps until the probe's bound falls below the threshold, by Chebyshev's rate for a spectrum in [0, ν]."""
    nu = float(theta[j] + residual[j])
    if mu <= nu * 1.0001:
        return math.inf
    return math.log(2 * math.sqrt(COLUMNS * op.n)) / math.acosh(2 * mu / nu - 1) if nu > 0 else 1.0


def _certify(
    op: Operator, space: Space, theta: Tensor, rank: int, *, wanted: float, chance: float, generator: torch.Generator
) -> float | None:
    """The certified bound, at least `wanted`; None where the space does not allow it or the probe does not confirm it in time."""
    mu = largest_mu(op, space, rank, wanted)
    nu = float(theta[space.theta.numel()]) if theta.numel() > space.theta.numel() else 0.0
    if mu <= nu:
        return None
    probe, goal = Probe(op, space, generator, mu), threshold(chance)
    budget = max(8, op.passes // 2 + 4)
    for step in range(budget):
        probe.step()
        if probe.claim(mu) < goal:
            return bound(op, space, _least_mu(probe, mu, goal), rank)
        if step and probe.top >= mu:
            return None
    return None


def _least_mu(probe: Probe, mu: float, goal: float) -> float:
    """The smallest μ the same data certify: what u is does not depend on μ, so the chance is spent once."""
    low, high = probe.top, mu
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (low, middle) if probe.claim(middle) < goal else (middle, high)
    return high
