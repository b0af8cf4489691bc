"""Numbers at places of a matrix: by index_put in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.scattered import entries, scattered
from tests.strategies import randn, seeds


@given(st.lists(st.integers(0, 34), max_size=60), seeds)
def test_places_named_twice_get_the_sum(chosen: list[int], seed: int) -> None:
    places, values = torch.tensor(chosen, dtype=torch.int64), randn(len(chosen), seed=seed).double()
    expected = torch.zeros(35, dtype=torch.float64).index_put((places,), 2 * values, accumulate=True).reshape(5, 7)
    dense = scattered(entries(places, values), 7, 2.0)
    assert torch.allclose(dense(slice(0, 5)), expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(torch.cat([dense(slice(row, row + 1)) for row in range(5)]), dense(slice(0, 5)))
