"""What the data of one delta measures by itself; inspect's rows of it, in test_inspect, are held against the dense difference."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.ops._spectrum import spectrum
from loratools.tensors import to_ref
from tests.strategies import dora, low_rank, randn


def test_a_loras_are_its_products() -> None:
    drawn = low_rank((7, 5), 2, 0)
    dense = drawn.dense(torch.zeros(7, 5, dtype=torch.float64))
    found = spectrum(drawn.delta)
    assert found["sigma"] == pytest.approx(torch.linalg.svdvals(dense)[:2].tolist(), rel=1e-9)
    assert found["norm"] == pytest.approx(float(dense.norm()), rel=1e-9) and 1 <= found["effective_rank"] <= 2
    turned = spectrum(dora(drawn, "out", 1).delta)
    assert turned["sigma"] == found["sigma"] and set(turned["magnitude"]) == {"min", "max"}


def test_a_differences_norm_and_nothing_of_a_saved_tensor() -> None:
    value = randn(3, 4, seed=0)
    found = spectrum(Full(diff=to_ref(value), scale=2.0))
    assert found == {"norm": pytest.approx(2 * float(value.double().norm()), rel=1e-9), "effective_rank": None, "sigma": None}
    assert spectrum(Replacement(value=to_ref(value))) == {"norm": None, "effective_rank": None, "sigma": None}


def test_values_that_are_not_finite_have_none() -> None:
    A = torch.ones(1, 3)
    A[0, 1] = math.nan
    found = spectrum(LowRank(A=to_ref(A), B=to_ref(torch.ones(2, 1)), alpha=1.0))
    assert found == {"norm": None, "effective_rank": None, "sigma": None}
