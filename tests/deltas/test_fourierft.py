"""FourierFT against the sum of cosines that it is, for sizes even and odd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.drawn import places
from loratools.deltas.fourierft import FourierFT
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), seeds)
def test_it_is_a_sum_of_cosines(out: int, width: int, count: int, seed: int) -> None:
    count = min(count, out * width)
    spectrum, W = randn(count, seed=seed), randn(out, width, seed=seed + 1)
    p, q, change = torch.arange(out).double()[:, None], torch.arange(width).double(), torch.zeros(out, width, dtype=torch.float64)
    for value, place in zip(spectrum.double(), places(seed, count, out, width).tolist(), strict=True):
        u, v = divmod(place, width)
        change += value * torch.cos(2 * math.pi * (u * p / out + v * q / width))
    delta = FourierFT(spectrum=to_ref(spectrum), seed=seed, scale=30.0)
    assert torch.allclose(applied(delta, W), W.double() + 30 / (out * width) * change, rtol=1e-11, atol=1e-11)
    fitted = delta.fitted(Spec("F32", (out, width)))
    assert fitted.norm() == pytest.approx(30 / (out * width) * float(change.norm()), rel=1e-9, abs=1e-12)


def test_any_blocks_and_threads_give_the_same_bytes() -> None:
    delta, W, threads = FourierFT(spectrum=to_ref(randn(300, seed=0)), seed=3, scale=9.0), randn(61, 90, seed=1), torch.get_num_threads()
    assert blocks_agree(delta, W)
    one = applied(delta, W)
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(applied(delta, W), one)
    finally:
        torch.set_num_threads(threads)
