"""Coupled: a bias that takes up a product with its weight, by plain algebra and in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.deltas import coupled
from loratools.deltas.coupled import Coupled
from loratools.deltas.modulated import Modulated, Spread
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn

ROWS, COLUMNS = 13, 7


def made(left: Tensor, right: Tensor | None = None) -> Coupled:
    D, E = (Spread(value=to_ref(randn(ROWS, seed=seed))) for seed in (1, 2))
    return Coupled(own=Modulated(times=D, plus=E), left=to_ref(left), right=None if right is None else to_ref(right))


@pytest.mark.parametrize("rank", [1, 3])
def test_algebra(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, b = randn(ROWS, COLUMNS, seed=3, dtype=torch.bfloat16), randn(ROWS, seed=4)
    left, right = randn(COLUMNS, rank, seed=5), None if rank == 1 else randn(rank, 1, seed=6)
    delta = made(left, right)
    assert delta.beside == ("weight",)
    delta = delta.supplied({"weight": to_ref(W)})
    c = left.double() if right is None else left.double() @ right.double()
    expected = b.double() * (1 + randn(ROWS, seed=1).double()) + randn(ROWS, seed=2).double() + (W.double() @ c)[:, 0]
    found = applied(delta, b)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12) and blocks_agree(delta, b)
    monkeypatch.setattr(coupled, "_BLOCK", 2 * COLUMNS)
    assert torch.equal(applied(delta, b), found)
    assert set(delta.refs()) == {"times.value", "plus.value", "left"} | (set() if right is None else {"right"})
    assert torch.equal(applied(delta.map(lambda ref: ref), b), found)


def test_what_does_not_meet_or_fit() -> None:
    for left, right in (((7,), None), ((7, 2), None), ((7, 2), (3, 1)), ((7, 2), (2, 2))):
        with pytest.raises(ShapeError, match="the factors do not meet"):
            made(torch.ones(left), None if right is None else torch.ones(right))
    delta = made(torch.ones(COLUMNS, 1))
    with pytest.raises(ShapeError, match=r"does not fit the weight: found \[7, 1\], expected \[in, r\] for \[13, 8\]"):
        delta.supplied({"weight": to_ref(torch.ones(ROWS, 8))})
    with pytest.raises(UnsupportedError):
        delta.supplied({"weight": to_ref(torch.ones(ROWS, COLUMNS, dtype=torch.int32))})
    with pytest.raises(ShapeError, match=r"the weight has other rows than the bias: found \[5, 7\], expected 13"):
        applied(delta.supplied({"weight": to_ref(torch.ones(5, COLUMNS))}), torch.ones(ROWS))
    assert delta.fits(Spec("F32", (ROWS,))) and not delta.fits(Spec("F32", (5,)))
