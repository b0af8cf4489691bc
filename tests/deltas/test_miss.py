"""MiSS entry by entry: inputs that the rank does not divide, narrow blocks; its exact product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.miss import MiSS
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), seeds)
def test_entries_product_and_norm(unit: int, times: int, width: int, rank: int, seed: int) -> None:
    rank, out = min(rank, width), unit * times
    block, W = randn(rank, unit, seed=seed), randn(out, width, seed=seed + 1)
    change = torch.tensor([[block[j % rank, o % unit] for j in range(width)] for o in range(out)]).double()
    delta = MiSS(block=to_ref(block), mini=times > 1).fitted(Spec("F32", (out, width)))
    assert torch.equal(applied(delta, W), W.double() + change)
    B, A = delta.product()
    assert torch.equal(B @ A, change) and A.shape[0] == rank == delta.facts()["rank"]
    assert delta.norm() == pytest.approx(float(change.norm()), rel=1e-12)


def test_any_blocks_give_the_same_bytes() -> None:
    assert blocks_agree(MiSS(block=to_ref(randn(5, 37, seed=0))), randn(37, 29, seed=5))


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="no matrix to repeat"):
        MiSS(block=to_ref(torch.ones(3)))
    block = to_ref(torch.ones(4, 6))
    delta = MiSS(block=block)
    assert delta.fits(Spec("F32", (6, 4))) and not delta.fits(Spec("F32", (12, 4))) and not delta.fits(Spec("F32", (6, 4, 1)))
    with pytest.raises(ShapeError, match=r"found \[6, 3\], expected \[6, at least 4\]"):
        delta.spec(Spec("F32", (6, 3)))
    with pytest.raises(ShapeError, match=r"expected \[a multiple of 6, at least 4\]"):
        MiSS(block=block, mini=True).spec(Spec("F32", (13, 4)))
    assert MiSS(block=block, mini=True).fits(Spec("F32", (12, 4)))
