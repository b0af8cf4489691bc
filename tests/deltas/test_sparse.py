"""Sparse: a weight with few numbers changed, by places counted in two ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.sparse import Sparse
from loratools.errors import FormatError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def made(values: Tensor, places: Tensor) -> Sparse:
    return Sparse(values=to_ref(values), places=to_ref(places))


@given(st.permutations(range(35)), st.integers(0, 35), seeds)
def test_both_ways_to_count(order: list[int], count: int, seed: int) -> None:
    places, values, W = torch.tensor(order[:count], dtype=torch.int32), randn(count, seed=seed), randn(5, 7, seed=seed + 1)
    expected = W.double().flatten().scatter_add(0, places.long(), values.double()).reshape(5, 7)
    flat, pairs = made(values, places), made(values, torch.stack([places // 7, places % 7]))
    assert torch.equal(applied(flat, W), expected) and torch.equal(applied(pairs, W), expected) and blocks_agree(flat, W)
    assert flat.fitted(Spec("F32", (5, 7))).norm() == pytest.approx(float(values.double().norm()), rel=1e-12)


def test_what_does_not_fit() -> None:
    for places in (torch.ones(3), torch.ones(1, 2), torch.ones(3, 2)):
        with pytest.raises(ShapeError, match=r"not a place for each value: found \[2\], .*, expected \[n\], and \[n\] or \[2, n\]"):
            made(torch.ones(2), places)
    with pytest.raises(UnsupportedError, match="does not hold whole numbers exactly"):
        made(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
    delta = made(torch.ones(6), torch.arange(6))
    assert delta.fits(Spec("F32", (2, 3))) and not delta.fits(Spec("F32", (1, 5))) and not delta.fits(Spec("F32", (2, 3, 1)))
    assert not delta.fits(Spec("I32", (2, 3))) and delta.shape() == ()
    with pytest.raises(FormatError, match="a place outside what it points into"):
        applied(made(torch.ones(1), torch.tensor([6])), torch.zeros(2, 3))
