"""Numbers at places of a matrix: by index_put in float64, places from files in all dtypes they come in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.scattered import entries, read_places, scattered
from loratools.errors import FormatError, ShapeError
from loratools.tensors import to_ref
from tests.strategies import randn, seeds


@given(st.lists(st.integers(0, 34), max_size=60), seeds)
def test_places_named_twice_get_the_sum(chosen: list[int], seed: int) -> None:
    places, values = torch.tensor(chosen, dtype=torch.int64), randn(len(chosen), seed=seed).double()
    expected = torch.zeros(35, dtype=torch.float64).index_put((places,), 2 * values, accumulate=True).reshape(5, 7)
    dense = scattered(entries(places, values), 7, 2.0)
    assert torch.allclose(dense(slice(0, 5)), expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(torch.cat([dense(slice(row, row + 1)) for row in range(5)]), dense(slice(0, 5)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64])
def test_places_of_a_file(dtype: torch.dtype) -> None:
    assert read_places(to_ref(torch.tensor([[0, 4], [6, 1]], dtype=dtype)), 5, 7).tolist() == [6, 29]
    assert read_places(to_ref(torch.tensor([34, 0], dtype=dtype)), 5, 7).tolist() == [34, 0]


@pytest.mark.parametrize("bad", [[35], [-1], [[5], [0]], [[0], [7]], [[-1], [0]], [[0], [-1]]])
def test_places_outside_the_weight(bad: list[int]) -> None:
    with pytest.raises(ShapeError, match=r"places outside the weight: found .*, expected within \[5, 7\]"):
        read_places(to_ref(torch.tensor(bad)), 5, 7)


@pytest.mark.parametrize("bad", [1.5, float("nan"), float("inf")])
def test_places_that_are_no_whole_numbers(bad: float) -> None:
    with pytest.raises(FormatError, match="no whole numbers"):
        read_places(to_ref(torch.tensor([1.0, bad])), 5, 7)
