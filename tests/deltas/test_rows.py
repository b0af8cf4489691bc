"""Rows: rows of a table by their indices, in the order given, whatever the blocks; the rest keeps its bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.rows import Rows
from loratools.errors import FormatError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import floats, randn, seeds


@given(st.permutations(range(12)), st.integers(0, 12), floats, seeds)
def test_it_is_index_copy(order: list[int], count: int, dtype: torch.dtype, seed: int) -> None:
    W, values, indices = randn(12, 5, seed=seed), randn(count, 5, seed=seed + 1, dtype=dtype), order[:count]
    expected = W.double().index_copy(0, torch.tensor(indices, dtype=torch.int64), values.double())
    delta = Rows(values=to_ref(values), indices=tuple(indices))
    assert torch.equal(applied(delta, W), expected) and blocks_agree(delta, W)


def test_a_row_that_stands_twice() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    assert torch.equal(applied(Rows(values=to_ref(values), indices=(4, 0, 4)), torch.zeros(5, 2))[[0, 4]], values[[1, 0]].double())
    with pytest.raises(FormatError, match="stands twice, with different values: found index 4"):
        Rows(values=to_ref(values), indices=(4, 4, 0))


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"not a row for each index: found \[3, 4\], expected \[2, columns\]"):
        Rows(values=to_ref(torch.ones(3, 4)), indices=(0, 1))
    delta = Rows(values=to_ref(torch.ones(2, 4)), indices=(5, 1))
    assert delta.fits(Spec("BF16", (6, 4))) and not delta.fits(Spec("F32", (6, 5))) and not delta.fits(Spec("F32", (6, 4, 1)))
    with pytest.raises(ShapeError, match="found 5, expected below 5; the vocabulary was larger in training"):
        delta.spec(Spec("F32", (5, 4)))
    with pytest.raises(ShapeError, match="rows of another length"):
        delta.spec(None)
    with pytest.raises(UnsupportedError):
        delta.spec(Spec("I32", (6, 4)))
