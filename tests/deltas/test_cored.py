"""Cores before kernels: einsum in float64."""

from __future__ import annotations

import torch

from loratools.deltas.cored import cored
from tests.strategies import randn


def test_it_is_a_sum_over_the_cores_second_axis() -> None:
    t, w = randn(3, 4, 2, 5, seed=0), randn(4, 6, seed=1)
    expected = torch.einsum("ijkl,jc->ickl", t.double(), w.double()).flatten(1)
    assert torch.allclose(cored(t, w), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(cored(t, w)[1:2], cored(t[1:2], w))
