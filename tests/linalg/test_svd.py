"""truncated_svd against the float64 SVD: quality, honesty of both numbers, edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.errors import ConvergenceError, NonFiniteError, OptionError
from loratools.linalg import _dense, svd
from loratools.linalg.spectrum import spectrum
from loratools.linalg.svd import Energy, MaxError, Truncated, truncated_svd
from tests.linalg._spectra import difference, spectra, with_spectrum

K = 600  # short side: above the Gram route's limit, small enough for a float64 oracle
CASES = dict(spectra(K)) | {"difference": None, "gaussian": None}


def matrix(name: str, m: int, n: int) -> Tensor:
    if name == "difference":
        return difference(m, n)
    if name == "gaussian":
        return torch.randn(m, n, generator=torch.Generator().manual_seed(3))
    return with_spectrum(m, n, CASES[name])


def check(D: Tensor, found: Truncated, sigma: Tensor) -> None:
    """What every result promises, against float64 singular values `sigma` of D."""
    norm, best = float(torch.linalg.vector_norm(sigma)), float(torch.linalg.vector_norm(sigma[found.rank :]))
    true = float(torch.linalg.matrix_norm(D.double() - found.B.double() @ found.A.double()))
    assert found.norm == pytest.approx(norm, rel=1e-12)  # both are float64 sums
    assert found.optimal <= best and found.optimal <= found.error
    assert found.error <= 1.0001 * best + 2e-7 * norm  # tolerance, and what writing float32 factors costs
    assert found.error == pytest.approx(true, rel=1e-6 if true > 1e-5 * norm else 1e-4)


@pytest.mark.parametrize("shape", [(700, K), (K, 900)], ids=["tall", "wide"])
@pytest.mark.parametrize("name", CASES)
def test_error_and_bound(name: str, shape: tuple[int, int]) -> None:
    D = matrix(name, *shape)
    sigma = torch.linalg.svdvals(D.double())
    for rank in (1, 8, 32):
        found = truncated_svd(D, rank)
        assert found.B.shape == (shape[0], rank) and found.A.shape == (rank, shape[1]) and found.rank == rank
        check(D, found, sigma)
        if found.error > 1e-6 * found.norm:  # below, only "rank ≤ r to working precision" is said
            assert found.error <= (1 + 2e-4) * found.optimal


@given(
    m=st.integers(1, 60), n=st.integers(1, 60), rank=st.integers(1, 70), decay=st.sampled_from([0, 0.5, 2, 6]), seed=st.integers(0, 99)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_small_shapes(m: int, n: int, rank: int, decay: float, seed: int) -> None:
    k = min(m, n)
    D = with_spectrum(m, n, torch.arange(1, k + 1, dtype=torch.float64) ** -decay, seed)
    sigma = torch.linalg.svdvals(D.double())
    for exact in (False, True):
        found = truncated_svd(D, rank, exact=exact)
        assert found.rank == min(rank, k) and found.method == ("gesdd" if exact else "gram")
        check(D, found, sigma)


def test_factors_are_balanced_and_orthogonal() -> None:
    found = truncated_svd(difference(700, 600), 8)
    gram = found.sigma.sqrt().outer(found.sigma.sqrt())
    for factor in (found.B.double().T @ found.B.double(), found.A.double() @ found.A.double().T):
        assert torch.allclose(factor / gram, torch.eye(8, dtype=torch.float64), atol=1e-5)  # float32 rounding of 700 rows


def test_sigma_are_the_singular_values() -> None:
    D = with_spectrum(700, 600, torch.linspace(1, 0.1, 8, dtype=torch.float64))
    assert torch.allclose(truncated_svd(D, 8).sigma, torch.linspace(1, 0.1, 8, dtype=torch.float64), rtol=1e-6)  # D itself is rounded


def test_low_rank_matrix_keeps_the_rank_asked_for() -> None:
    for shape in ((50, 40), (700, 600)):
        D = with_spectrum(*shape, torch.ones(3, dtype=torch.float64))
        found = truncated_svd(D, 16)
        assert found.rank == 16 and found.error < 2e-7 * found.norm and (found.sigma[3:] < 1e-6).all()


def test_zero_matrix() -> None:
    found = truncated_svd(torch.zeros(30, 20), 4)
    assert (found.rank, found.norm, found.error, found.optimal, found.method) == (4, 0.0, 0.0, 0.0, "zero")
    assert not found.B.any() and not found.A.any()
    assert truncated_svd(torch.zeros(30, 20), Energy(0.9)).rank == 1


@pytest.mark.parametrize("rule", [Energy(0.5), Energy(0.9), Energy(0.999), MaxError(0.5), MaxError(0.05), MaxError(1e-3)])
@pytest.mark.parametrize("name", ["power 1/2", "power 2", "geometric 0.99", "rank 8", "difference"])
def test_rules_give_the_smallest_rank(name: str, rule: Energy | MaxError) -> None:
    D = matrix(name, 700, K)
    sigma = torch.linalg.svdvals(D.double())
    found = truncated_svd(D, rule)
    assert found.rank == rule.rank(sigma, float(sigma.square().sum()))
    check(D, found, sigma)


def test_max_rank_caps_a_rule() -> None:
    D = matrix("power 1/2", 700, K)
    found = truncated_svd(D, Energy(0.9), max_rank=5)
    assert found.rank == 5
    check(D, found, torch.linalg.svdvals(D.double()))
    assert truncated_svd(D, 9, max_rank=4).rank == 4


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(60, 50), (700, 600)])
def test_any_scale(scale: float, shape: tuple[int, int]) -> None:
    D = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale
    check(D, truncated_svd(D, 4), torch.linalg.svdvals(D.double()))


def test_float64_and_dtype() -> None:
    D = with_spectrum(700, 600, torch.logspace(0, -9, 30, dtype=torch.float64)).double()
    assert truncated_svd(D, 4).B.dtype == torch.float32
    wide = truncated_svd(D, 4, dtype=torch.float64)
    sigma = torch.linalg.svdvals(D)
    assert wide.error == pytest.approx(float(torch.linalg.vector_norm(sigma[4:])), rel=1e-4)
    half = truncated_svd(D, 4, dtype=torch.bfloat16)
    true = float(torch.linalg.matrix_norm(D - half.B.double() @ half.A.double()))
    assert half.B.dtype == torch.bfloat16 and half.error == pytest.approx(true, rel=1e-6)  # measured as written
    assert half.error > wide.error


def test_inputs_are_left_alone_and_no_global_state_is_used() -> None:
    for dtype in (torch.float32, torch.float64):
        D = difference(700, 600).to(dtype)
        before, state = D.clone(), torch.get_rng_state()
        first, second, other = truncated_svd(D, 8), truncated_svd(D, 8), truncated_svd(D, 8, seed=1)
        assert torch.equal(D, before) and torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A) and first.error == second.error
        assert first.method == "krylov" and not torch.equal(first.B, other.B)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("exact", [False, True])
def test_non_finite_is_said_first(bad: float, exact: bool) -> None:
    D = torch.zeros(40, 30)
    D[3, 4] = bad
    with pytest.raises(NonFiniteError):
        truncated_svd(D, 2, exact=exact)
    with pytest.raises(NonFiniteError):
        spectrum(D, top=2)


def test_overflow_in_the_output_dtype() -> None:
    with pytest.raises(NonFiniteError):
        truncated_svd(torch.full((40, 30), 1e12), 1, dtype=torch.float16)


@pytest.mark.parametrize(
    "call",
    [
        lambda: truncated_svd(torch.zeros(3), 1),
        lambda: truncated_svd(torch.zeros(3, 3, dtype=torch.bfloat16), 1),
        lambda: truncated_svd(torch.zeros(3, 3), 0),
        lambda: truncated_svd(torch.zeros(3, 3), 1, max_rank=0),
        lambda: truncated_svd(torch.zeros(3, 3), 1, tolerance=0.0),
        lambda: Energy(0.0),
        lambda: Energy(1.1),
        lambda: MaxError(1.0),
    ],
)
def test_options_that_make_no_sense(call: object) -> None:
    with pytest.raises(OptionError):
        call()  # type: ignore[operator]


def test_exact_is_optimal() -> None:
    D = matrix("difference", 300, 200)
    sigma = torch.linalg.svdvals(D.double())
    found = truncated_svd(D, 8, exact=True)
    assert found.method == "gesdd"
    assert found.error == pytest.approx(float(torch.linalg.vector_norm(sigma[8:])), rel=1e-7)  # float32 rounding of the factors
    check(D, found, sigma)


def test_the_ladder_below_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    D = matrix("difference", 300, 200)
    sigma = torch.linalg.svdvals(D.double())
    rungs = dict(_dense._RUNGS)
    for number, name in enumerate(rungs):
        broken = {rung: fails if index < number else attempt for index, (rung, attempt) in enumerate(rungs.items())}
        monkeypatch.setattr(_dense, "_RUNGS", broken)
        found = truncated_svd(D, 8, exact=True)
        assert found.method == name or (name == "gesvd" and found.method == "eigh")  # scipy, which has gesvd, may not be there
        check(D, found, sigma)
    monkeypatch.setattr(_dense, "_RUNGS", dict.fromkeys(rungs, fails))
    with pytest.raises(ConvergenceError):
        truncated_svd(D, 8, exact=True)


def test_a_global_switch_to_cheap_products_changes_no_promise() -> None:
    D = difference(700, 600)
    sigma = torch.linalg.svdvals(D.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = truncated_svd(D, 8)
    finally:
        torch.set_float32_matmul_precision(before)
    check(D, found, sigma)


@pytest.mark.parametrize("name", ["power 1/2", "power 2", "geometric 0.99", "flat", "three distinct", "rank 8", "difference", "gaussian"])
@pytest.mark.parametrize("shape", [(300, 200), (700, K), (K, 900)])
def test_spectrum(name: str, shape: tuple[int, int]) -> None:
    if name == "three distinct" and min(shape) < K:
        return
    D = matrix(name, *shape) if min(shape) == K or name in ("difference", "gaussian") else with_spectrum(*shape, CASES[name][: min(shape)])
    true = torch.linalg.svdvals(D.double())
    for top in (8, 32, 5000):
        sigma, norm = spectrum(D, top=top)
        assert sigma.shape == (min(top, *shape),) and norm == pytest.approx(float(torch.linalg.vector_norm(true)), rel=1e-12)
        ratio = sigma.square().cumsum(0) / true[: sigma.numel()].square().cumsum(0)
        assert float((ratio - 1).abs().max()) <= 2e-4  # twice the tolerance: it is an estimate


def test_spectrum_of_zero() -> None:
    sigma, norm = spectrum(torch.zeros(9, 7), top=3)
    assert sigma.tolist() == [0.0] * 3 and norm == 0.0


def test_gram_and_krylov_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    D = difference(700, 600)
    krylov = truncated_svd(D, 8)
    monkeypatch.setattr(svd, "_SMALL", 10_000)
    gram = truncated_svd(D, 8)
    assert (krylov.method, gram.method) == ("krylov", "gram")
    assert krylov.error == pytest.approx(gram.error, rel=1e-4)
    assert math.isclose(gram.optimal, gram.error, rel_tol=1e-6)  # the Gram route's bound is tight at an error of 40 % of the norm


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("exact", [False, True])
def test_cuda(exact: bool) -> None:
    D = difference(700, 600)
    sigma = torch.linalg.svdvals(D.double())
    found = truncated_svd(D.cuda(), 8, exact=exact)
    assert found.B.is_cuda and found.A.is_cuda and found.sigma.device.type == "cpu"
    check(D.cuda(), found, sigma)
