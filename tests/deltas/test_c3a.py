"""C3A: circulant blocks entry by entry, and by the transforms that peft uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.c3a import C3A
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), seeds)
def test_it_is_a_circular_convolution(rows: int, columns: int, size: int, seed: int) -> None:
    kernel, W = randn(rows, columns, size, seed=seed), randn(rows * size, columns * size, seed=seed + 1)
    x = torch.eye(columns * size, dtype=torch.float64).reshape(-1, columns, size)
    waves = torch.einsum("xnb,mnb->xmb", torch.fft.ifft(x), torch.fft.fft(kernel.double()))
    change = torch.fft.fft(waves).real.flatten(1).T / (columns * size)
    delta = C3A(kernel=to_ref(kernel))
    assert torch.allclose(applied(delta, W), W.double() + change, rtol=1e-12, atol=1e-12)
    assert delta.norm() == pytest.approx(float(change.norm()), rel=1e-12) and blocks_agree(delta, W)


def test_entries() -> None:
    kernel = torch.tensor([[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]])
    expected = torch.tensor([[1.0, 2, 4, 8, 16, 32], [4, 1, 2, 32, 8, 16], [2, 4, 1, 16, 32, 8]]).double() / 6
    assert torch.equal(applied(C3A(kernel=to_ref(kernel)), torch.zeros(3, 6)), expected)


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="no rows of circulant blocks"):
        C3A(kernel=to_ref(torch.ones(2, 3)))
    delta = C3A(kernel=to_ref(torch.ones(2, 3, 4)))
    assert delta.fits(Spec("F32", (8, 12))) and not delta.fits(Spec("F32", (12, 8))) and delta.product() is None
