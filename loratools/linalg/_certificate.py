"""A lower bound on the best rank-r error of a tall X, from a space V that nearly holds the leading singular vectors.

With G = XᵀX and Θ, S the projection of G onto V and its coupling to the rest, every eigenvalue of G is at most that of
M = [[Θ, Sᵀ], [S, μI]] if no eigenvalue of C = (I − VVᵀ)G(I − VVᵀ) is above μ. `bound` turns μ into the bound on the error;
`Probe` shows with a random block, drawn after V, that C stays below μ. The proofs and the rounding floors are in
spec/certificate.md; the letters are the same.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.linalg._operator import Operator

COLUMNS = 16  # of the random block: at 16 a chance of 1e-6 still leaves |z|² ≥ 1.45 of its mean 16
FAILURE = 1e-6  # the chance, over the random block, that a bound claims too much


@dataclass(frozen=True, kw_only=True)
class Space:
    """Orthonormal V (n, j) of Ritz vectors with Z = XV, W = XᵀXV, Ritz values theta (falling) and S (j, j), SᵀS = RᵀR, R = W − Vθ."""

    V: Tensor
    Z: Tensor
    W: Tensor
    theta: Tensor
    S: Tensor


def project(op: Operator, V: Tensor) -> Space:
    """Rayleigh-Ritz in float64 on the span of V (n, j): two passes, however V was found."""
    V = torch.linalg.qr(V.to(torch.float64))[0]
    Z, W = op.gram(V)
    theta, Y = torch.linalg.eigh((Z.T @ Z).cpu())
    theta, Y = theta.flip(0).clamp_min(0), Y.flip(1).to(V.device)
    V, Z, W = V @ Y, Z @ Y, W @ Y
    R = W - V @ (V.T @ W)
    return Space(V=V, Z=Z, W=W, theta=theta, S=torch.linalg.qr(R)[1].cpu())


def head(space: Space, mu: float, rank: int) -> float:
    """Σ of the `rank` largest eigenvalues of M: no rank-`rank` sum of XᵀX's eigenvalues is larger if C ≼ μI."""
    j, rows = space.theta.numel(), space.S.shape[0]
    M = torch.zeros(j + rows, j + rows, dtype=torch.float64)
    M.diagonal()[:j], M.diagonal()[j:] = space.theta, mu
    M[j:, :j], M[:j, j:] = space.S, space.S.T
    top = torch.linalg.eigvalsh(M).flip(0)[:rank].clamp_min(mu)  # with further copies of μ, of which there may be many
    return float(top.sum()) + max(0, rank - int(top.numel())) * mu


def bound(op: Operator, space: Space, mu: float, rank: int) -> float:
    """The lower bound on the best rank-`rank` error of X if C ≼ μI; 0 where rounding leaves nothing to claim."""
    floor = 4 * 2.0**-53 * (op.m + op.n) * math.sqrt(rank) * op.norm**2
    return math.sqrt(max(0.0, op.norm**2 - head(space, mu, rank) - floor))


def largest_mu(op: Operator, space: Space, rank: int, wanted: float) -> float:
    """The largest μ, to half a percent of its distance to θ_rank, for which the bound is still `wanted`; 0 if there is none."""
    low, high = 0.0, float(space.theta[0])
    if bound(op, space, high, rank) >= wanted:
        return high
    if bound(op, space, low, rank) < wanted:
        return 0.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if bound(op, space, middle, rank) >= wanted else (low, middle)
    return low


class Probe:
    """Lanczos on I ⊗ C from a random block of 16 columns drawn independently of V: shows μ > λmax(C), or fails to.

    Y₀ = (I − VVᵀ)Ω/β, βₖYₖ₊₁ = (C − αₖ)Yₖ − βₖ₋₁Yₖ₋₁, in Frobenius norms. C's top eigenvector u has ‖Ωᵀu‖² from χ²₁₆,
    whatever V is; `claim` follows it through the recurrence, and through the rounding of each step: float64, or float32 where
    D is float32 and that is enough for a claim at `mu`.
    """

    def __init__(self, op: Operator, space: Space, generator: torch.Generator, mu: float) -> None:
        narrow = op.narrow and 8 * op.rounding(torch.float32) * op.norm * math.sqrt(COLUMNS * op.n) < 0.1 * math.sqrt(mu)
        dtype = torch.float32 if narrow else torch.float64
        self.op, self.V = op, space.V.to(dtype)
        self.product = self._narrow if narrow else op.gram
        self.noise = 4 * op.rounding(dtype)
        self.leak = float(torch.linalg.matrix_norm(space.S, 2)) if space.S.numel() else 0.0
        Y = self._outside(torch.randn(op.n, COLUMNS, generator=generator, dtype=torch.float64).to(self.V.device, dtype))
        self.start = _norm(Y)
        self.Y, self.before = Y / self.start, torch.zeros_like(Y)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.errors: list[float] = []
        self.last = 1.0

    def step(self) -> None:
        """One product with C: two passes."""
        X, W = self.product(self.Y)
        W = self._outside(W)
        alpha = float(torch.sum(self.Y * W, dtype=torch.float64))
        W = W - alpha * self.Y - (self.beta[-1] if self.beta else 0.0) * self.before
        beta = _norm(W)
        self.errors.append(self.noise * (self.op.norm * _norm(X) + self.leak + alpha))
        self.alpha.append(alpha)
        self.beta.append(beta)
        self.before, self.Y = self.Y, W / max(beta, 1e-300)
        wide = self.Y.double()
        self.last = float(torch.linalg.eigvalsh(wide.T @ wide)[-1]) ** 0.5

    @property
    def top(self) -> float:
        """The largest Ritz value seen: C has an eigenvalue at least about so large."""
        return float(torch.linalg.eigvalsh(self._jacobi())[-1])

    def claim(self, mu: float) -> float:
        """An upper bound on ‖Ωᵀu‖ if the eigenvalue of u is μ or more; inf where it says nothing."""
        shifted = mu * torch.eye(len(self.alpha), dtype=torch.float64) - self._jacobi()
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            return math.inf
        first = torch.zeros(len(self.alpha), 1, dtype=torch.float64)
        first[0] = 1
        weights = torch.cholesky_solve(first, factor)[:, 0].clamp_min(0)
        rounding = float(weights @ torch.tensor(self.errors, dtype=torch.float64))
        return self.start * 1.001 * (float(weights[-1]) * self.beta[-1] * self.last + rounding)

    def _narrow(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        X = self.op.forward(Y)
        return X, self.op.back(X)

    def _outside(self, Y: Tensor) -> Tensor:
        Y = Y - self.V @ (self.V.T @ Y)
        return Y - self.V @ (self.V.T @ Y)

    def _jacobi(self) -> Tensor:
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        T = torch.diag(torch.tensor(self.alpha, dtype=torch.float64))
        return T + torch.diag(off, 1) + torch.diag(off, -1) if len(off) else T


@functools.cache
def threshold(chance: float) -> float:
    """√c with P(χ²₁₆ < c) = chance, by bisection.

    >>> round(threshold(1e-6) ** 2, 3)
    1.451
    """
    low, high = 0.0, 64.0
    half = torch.tensor(COLUMNS / 2, dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        below = float(torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64))) < chance
        low, high = (middle, high) if below else (low, middle)
    return math.sqrt(low)


def _norm(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X, dtype=torch.float64))
