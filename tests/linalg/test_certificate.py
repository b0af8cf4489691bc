"""The certificate: each step of its proof as an inequality, its chance by Monte Carlo, and the traps that break it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.linalg._certificate import COLUMNS, Probe, Space, bound, head, largest_mu, project, threshold
from loratools.linalg._krylov import Krylov
from loratools.linalg._operator import Operator
from tests.linalg._spectra import repeated, with_spectrum


def outside(op: Operator, space: Space) -> tuple[float, Tensor]:
    """The top eigenvalue and eigenvector of C = (I − VVᵀ)XᵀX(I − VVᵀ), from the dense matrix."""
    X = torch.cat([block.clone() for block in op.blocks()])
    P = torch.eye(op.n, dtype=torch.float64) - space.V @ space.V.T
    values, vectors = torch.linalg.eigh(P @ X.T @ X @ P)
    return float(values[-1]), vectors[:, -1]


def random_space(op: Operator, j: int, quality: float, seed: int) -> Space:
    """Ritz vectors from the leading singular vectors of X plus noise; quality 0 is pure noise."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.cat([block.clone() for block in op.blocks()])
    leading = torch.linalg.svd(X)[2][:j].T
    return project(op, quality * leading + torch.randn(op.n, j, generator=generator, dtype=torch.float64) / op.n)


def test_thresholds_are_quantiles_of_chi_square() -> None:
    draws = torch.randn(200_000, COLUMNS, generator=torch.Generator().manual_seed(0)).square().sum(1)
    for chance in (0.5, 0.1, 0.01):
        below = float((draws < threshold(chance) ** 2).double().mean())
        assert below == pytest.approx(chance, abs=4 * math.sqrt(chance / 200_000))  # four standard errors
    assert threshold(1e-6) ** 2 == pytest.approx(1.4507, abs=1e-4)  # χ²₁₆ tables


@given(
    j=st.integers(1, 12), decay=st.sampled_from([0.0, 0.5, 2.0]), quality=st.sampled_from([0.0, 0.3, 10.0]), seed=st.integers(0, 999)
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_bound_is_below_the_best_error_if_mu_is_above_the_rest(j: int, decay: float, quality: float, seed: int) -> None:
    op = Operator(with_spectrum(40, 25, torch.arange(1, 26, dtype=torch.float64) ** -decay, seed))
    space = random_space(op, j, quality, seed)
    nu, _ = outside(op, space)
    sigma = torch.linalg.svdvals(torch.cat([block.clone() for block in op.blocks()]))
    for rank in (1, 2, j, 20):
        best = float(torch.linalg.vector_norm(sigma[rank:]))
        for mu in (nu, 1.5 * nu, 1.5 * max(nu, float(space.theta[0]))):
            assert bound(op, space, mu * (1 + 1e-12), rank) <= best  # 1e-12: nu itself is computed
            assert head(space, mu * (1 + 1e-12), rank) >= float(sigma[:rank].square().sum()) * (1 - 1e-12)


def test_bound_is_tight_for_exact_singular_vectors() -> None:
    op = Operator(with_spectrum(40, 25, torch.arange(1, 26, dtype=torch.float64) ** -1.0))
    sigma = torch.linalg.svdvals(torch.cat([block.clone() for block in op.blocks()]))
    space = random_space(op, 8, 1e12, 0)
    best = float(torch.linalg.vector_norm(sigma[5:]))
    assert bound(op, space, float(sigma[8]) ** 2, 5) == pytest.approx(best, rel=1e-9)
    mu = largest_mu(op, space, 5, best / 1.0001)
    assert float(sigma[8]) ** 2 < mu < 1.01 * float(sigma[4]) ** 2 and bound(op, space, mu, 5) >= best / 1.0001


@given(steps=st.integers(1, 8), seed=st.integers(0, 999), wide=st.booleans(), quality=st.sampled_from([0.0, 0.3, 10.0]))
@settings(max_examples=80, deadline=None)
def test_claim_never_falls_below_what_the_block_holds(steps: int, seed: int, wide: bool, quality: float) -> None:
    # ‖Ωᵀu‖ ≤ claim(ν), always, in float64 and in float32: the inequality under the whole certificate, with no chance in it
    D = with_spectrum(90, 70, torch.arange(1, 71, dtype=torch.float64) ** -0.7, seed)
    op = Operator(D.double() if wide else D)
    space = random_space(op, 6, quality, seed)
    nu, u = outside(op, space)
    omega = torch.randn(op.n, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    probe = Probe(op, space, torch.Generator().manual_seed(seed), nu)
    assert probe.V.dtype == (torch.float64 if wide else torch.float32)
    for _ in range(steps):
        probe.step()
    held, claims = float(torch.linalg.vector_norm(omega.T @ u)), [probe.claim(nu * factor) for factor in (1.0, 1.1, 2.0)]
    assert held <= claims[0]
    assert claims[0] >= claims[1] >= claims[2]  # falling in μ, so one value speaks for all above it


def test_chance_of_a_false_claim_with_a_hidden_eigenvalue() -> None:
    # C has one eigenvalue at 1.0005 μ and the rest below 0.3 μ: any claim for μ is false. At δ = 5 % the rate may not exceed 5 %
    # (three standard errors of 1500 trials allowed) and should come close to it, or the test would show nothing.
    n, trials, chance = 48, 1500, 0.05
    values = torch.cat([torch.tensor([4.0, 3.0, 1.0005]), torch.linspace(0.3, 0.01, n - 3)]).double()
    op = Operator(torch.diag(values.sqrt()))
    space = project(op, torch.eye(n, dtype=torch.float64)[:, :2])
    mu, generator, false = 1.0 / op.unit**2, torch.Generator().manual_seed(0), 0
    for _ in range(trials):
        probe = Probe(op, space, generator, mu)
        for _ in range(6):
            probe.step()
            if probe.claim(mu) < threshold(chance):
                false += 1
                break
    assert 0.005 <= false / trials <= chance + 3 * math.sqrt(chance * (1 - chance) / trials)


def test_a_true_bound_is_certified_soon() -> None:
    values = torch.cat([torch.tensor([4.0, 3.0]), torch.linspace(0.3, 0.01, 98)]).double()
    op = Operator(torch.diag(values.sqrt()))
    space = project(op, torch.eye(100, dtype=torch.float64)[:, :2])
    probe = Probe(op, space, torch.Generator().manual_seed(0), 1.0 / op.unit**2)
    for _ in range(6):  # Chebyshev's rate at 1 / 0.3: a factor of 11 a step, and 2·√(16·100)/1.2 to bridge
        probe.step()
    assert probe.claim(1.0 / op.unit**2) < threshold(1e-6) and probe.top == pytest.approx(0.3 / op.unit**2, rel=0.05)


@pytest.mark.parametrize("runs", [((3, 1.0), (197, 0.5)), ((40, 1.0), (100, 0.5), (60, 0.1)), ((5, 1.0),), ((1, 1.0), (1, 1e-6))])
def test_krylov_stays_orthonormal_past_breakdown(runs: tuple[tuple[int, float], ...]) -> None:
    # With d distinct singular values the block Krylov space is complete after d steps; what follows is rounding noise
    op = Operator(with_spectrum(250, 200, repeated(*runs)))
    basis = Krylov(op, 12, torch.Generator().manual_seed(0))
    for _ in range(8):
        basis.extend()
    Q = basis.Q.double()
    assert float((Q.T @ Q - torch.eye(basis.dim)).abs().max()) < 1e-5  # float32
    X = torch.cat([block.clone() for block in op.blocks()])
    assert float((basis.T - Q.T @ X.T @ X @ Q).abs().max()) < 1e-6 * op.norm**2


def test_project_trusts_nothing_about_the_basis() -> None:
    # Columns that are nearly parallel, as after a breakdown that went unnoticed, still give orthonormal Ritz vectors
    op = Operator(with_spectrum(60, 50, torch.arange(1, 51, dtype=torch.float64) ** -1.0))
    one = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    space = project(op, one + 1e-6 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert torch.allclose(space.V.T @ space.V, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(space.S.T @ space.S, _coupling(op, space), atol=1e-12)


def _coupling(op: Operator, space: Space) -> Tensor:
    X = torch.cat([block.clone() for block in op.blocks()])
    R = X.T @ X @ space.V - space.V @ torch.diag(space.theta)
    return R.T @ R
