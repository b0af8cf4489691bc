"""Bat by plain algebra on the blocks of a weight, whatever blocks of rows it comes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.bat import Bat
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), seeds)
def test_algebra(count: int, columns: int, size: int, seed: int) -> None:
    M, W = randn(count, size, size, seed=seed), randn(count * size, columns * size, seed=seed + 1).double()
    blocks = W.reshape(count, size, columns, size).transpose(1, 2)
    change = (blocks @ M.double().unsqueeze(1) + M.double().unsqueeze(1)).transpose(1, 2).reshape(W.shape)
    delta = Bat(M=to_ref(M))
    assert torch.allclose(applied(delta, W), W + change, rtol=1e-12, atol=1e-12) and delta.align == size
    assert blocks_agree(delta, W)


def test_a_literal() -> None:
    M, W = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[5.0, 7.0], [11.0, 13.0]])
    assert applied(Bat(M=to_ref(M)), W).tolist() == [[5 + 10 + 2, 7 + 14 + 2], [11 + 33 + 3, 13 + 39 + 3]]


def test_what_does_not_fit() -> None:
    delta = Bat(M=to_ref(torch.ones(2, 3, 3)))
    assert delta.fits(Spec("F32", (6, 9))) and not delta.fits(Spec("F32", (6, 8))) and not delta.fits(Spec("F32", (3, 9)))
    with pytest.raises(ShapeError, match=r"expected \[6, a multiple of 3\]"):
        delta.spec(None)
    with pytest.raises(ShapeError, match="no square matrices side by side"):
        Bat(M=to_ref(torch.ones(2, 3, 4))).spec(Spec("F32", (6, 9)))
