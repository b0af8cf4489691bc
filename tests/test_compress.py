"""Factors from an SVD: balanced, rounded once, of the scaling asked for; ranks that lose nothing; alphas that give a scaling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.compress import Style, alpha_for, hollow, known_of, lossless_rank, padded, recast, rounded, truncated, widest
from loratools.deltas.lowrank import LowRank
from loratools.errors import NonFiniteError
from loratools.linalg.product import product_svd
from loratools.tensors import read_tensor, to_ref


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low(rank: int = 3, dtype: torch.dtype = torch.float32, alpha: float = 2.0, rslora: bool = False) -> LowRank:
    return LowRank(A=to_ref(randn(rank, 9, seed=1).to(dtype)), B=to_ref(randn(7, rank).to(dtype)), alpha=alpha, rslora=rslora)


@settings(max_examples=30)
@given(st.integers(1, 8), st.sampled_from([1.0, 0.25, -3.0, 1e-3]), st.booleans(), st.sampled_from(["F32", "F64", "BF16", "F16"]))
def test_truncated_factors_are_balanced_and_of_the_scaling(rank: int, scaling: float, rslora: bool, code: str) -> None:
    known = product_svd(randn(7, 6), randn(6, 9, seed=1))
    found = truncated(known, rank, Style(code=code, shape=(7, 3, 3), layer="conv", scaling=scaling, rslora=rslora))
    delta = found.delta
    assert (delta.rank, delta.shape(), delta.layer, delta.rslora, delta.A.spec.dtype) == (rank, (7, 3, 3), "conv", rslora, code)
    assert delta.scaling == pytest.approx(scaling, rel=1e-15) or code == "F16"
    B, A = delta.factors()
    unit = {"F64": 1e-14, "F32": 2.0**-23, "BF16": 2.0**-7, "F16": 2.0**-10}[code]
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=unit)
    error = float((known.U * known.S @ known.Vh - delta.scaling * B @ A).norm())
    assert found.error == pytest.approx(error, abs=1e-13 * found.norm)
    assert found.optimal == pytest.approx(float(known.S[rank:].norm()), abs=1e-14)


def test_a_change_of_nothing() -> None:
    nothing = LowRank(A=to_ref(torch.zeros(2, 4)), B=to_ref(torch.ones(3, 2)), alpha=0.0)
    known, noise = known_of([(nothing, 1.0)])
    found = truncated(known, 1, Style(code="F32", shape=(3, 4), layer="linear", scaling=0.0))
    assert (found.norm, found.error, found.delta.scaling, lossless_rank(known, noise, "F32")) == (0, 0, 0, 1)


def test_lossless_ranks_drop_copies_and_noise_alone() -> None:
    one, other = low(3), low(2)
    assert lossless_rank(*known_of([(one, 1.0), (one, 0.5)]), "F64") == 3
    assert lossless_rank(*known_of([(one, 1.0), (one, -1.0)]), "F64") == 1
    small = known_of([(one, 1.0), (LowRank(A=to_ref(randn(1, 9, seed=7)), B=to_ref(randn(7, 1, seed=8)), alpha=1.0), 1e-10)])
    assert lossless_rank(*small, "F64") == 4 and lossless_rank(*small, "F32") == 3  # float32 factors cannot show 1e-10 of a change
    assert lossless_rank(*known_of([(one, 1.0), (other, 1e-6)]), "F32") == 5


@settings(max_examples=100)
@given(st.floats(1e-6, 1e6), st.integers(1, 512), st.booleans())
def test_an_alpha_gives_its_scaling(scaling: float, rank: int, rslora: bool) -> None:
    alpha = alpha_for(scaling, rank, rslora)
    found = alpha / math.sqrt(rank) if rslora else alpha / rank
    assert abs(found - scaling) <= math.ulp(scaling)  # where no float is exact, a neighbour


def test_padding_keeps_scaling_and_bytes() -> None:
    grown = padded(low(3, torch.bfloat16, rslora=True), 8)
    assert (grown.rank, grown.scaling) == (8, low(3, rslora=True).scaling)
    assert torch.equal(read_tensor(grown.A)[:3], read_tensor(low(3, torch.bfloat16).A)) and not read_tensor(grown.B)[:, 3:].any()
    assert padded(low(3), 2).rank == 3


def test_dtypes() -> None:
    f16, bf16, f64 = torch.float16, torch.bfloat16, torch.float64
    for one, other, code in ((f16, f16, "F16"), (f16, bf16, "F32"), (f64, f16, "F64")):
        assert widest([low(dtype=one), low(dtype=other)]) == code
    ref = to_ref(randn(3, 4))
    assert recast(ref, "F64") is ref and recast(ref, "F16").spec.dtype == "F16"
    tie = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)  # torch goes by way of float32, and loses what is above the tie
    assert float(read_tensor(rounded(tie, "BF16"))) == 1 + 2.0**-7
    with pytest.raises(NonFiniteError, match="float16"):
        rounded(torch.tensor([1e5], dtype=torch.float64), "F16")
    assert (hollow(low(3), 5, "BF16").A.spec.shape, hollow(low(3), 5, "BF16").B.spec.dtype) == ((5, 9), "BF16")
