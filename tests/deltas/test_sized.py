"""Sized: what only the weight's shape tells is filled in, once, and then holds."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.miss import MiSS
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref


def test_a_weight_gives_the_shape() -> None:
    delta = MiSS(block=to_ref(torch.ones(2, 6)))
    assert delta.shape() == ()
    fitted = delta.fitted(Spec("F32", (6, 9)))
    assert fitted.shape() == (6, 9) and fitted.fits(Spec("BF16", (6, 9))) and not fitted.fits(Spec("F32", (6, 8)))


def test_what_has_no_shape_to_give() -> None:
    delta = MiSS(block=to_ref(torch.ones(2, 6)))
    with pytest.raises(ShapeError, match="changes a tensor that the base lacks"):
        delta.spec(None)
    with pytest.raises(ShapeError, match=r"a change of matrices only: found \[6, 3, 3\]"):
        delta.spec(Spec("F32", (6, 3, 3)))
    with pytest.raises(UnsupportedError):
        delta.spec(Spec("I32", (6, 9)))
