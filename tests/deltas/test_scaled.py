"""Scaled: rows or columns times numbers, also those of a convolution's channels; undone exactly by its record."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.scaled import Scaled
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 2, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_it_is_a_product_along_an_axis(axis: int, shape: tuple[int, ...], offset: float) -> None:
    W, factors = randn(*shape, seed=0), randn(shape[axis], seed=1)
    expected = W.double() * (offset + factors.double()).reshape((-1,) + (1,) * (len(shape) - 1 - axis))
    delta = Scaled(l=to_ref(factors), axis=axis, offset=offset)
    assert torch.equal(applied(delta, W), expected) and blocks_agree(delta, W)


def test_a_bias() -> None:
    assert torch.equal(applied(Scaled(l=to_ref(torch.tensor([2.0, 3.0]))), torch.tensor([5.0, 7.0])), torch.tensor([10.0, 21.0]).double())


def test_what_it_does_not_fit() -> None:
    delta = Scaled(l=to_ref(torch.ones(4)), axis=1)
    assert delta.fits(Spec("F32", (9, 4))) and not delta.fits(Spec("F32", (4, 9))) and not delta.fits(Spec("F32", (4,)))
    with pytest.raises(ShapeError, match="other columns than the weight has"):
        delta.spec(Spec("F32", (4, 5)))
    with pytest.raises(UnsupportedError):
        delta.spec(Spec("I32", (9, 4)))
