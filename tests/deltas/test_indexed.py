"""Places: whole numbers within bounds, in all dtypes they come in, of an axis or of a matrix."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.indexed import read_places, require_whole
from loratools.errors import FormatError
from loratools.tensors import to_ref


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_places_of_any_width(dtype: torch.dtype) -> None:
    ref = to_ref(torch.tensor([[2, 0]], dtype=dtype))
    require_whole(ref)
    assert read_places(ref, 3).tolist() == [[2, 0]] and read_places(ref, 3).dtype == torch.int64
    with pytest.raises(FormatError, match="a place outside what it points into: found 0 to 2, expected 0 to 1"):
        read_places(ref, 2)


def test_what_is_no_place() -> None:
    with pytest.raises(FormatError, match="found -1 to -1"):
        read_places(to_ref(torch.tensor([-1])), 2)
    with pytest.raises(FormatError, match=r"places are whole numbers: found F32 \[1\]"):
        require_whole(to_ref(torch.ones(1)))
    assert read_places(to_ref(torch.ones(0, dtype=torch.int32)), 0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.float32, torch.float64])
def test_places_of_a_matrix(dtype: torch.dtype) -> None:
    assert read_places(to_ref(torch.tensor([[0, 4], [6, 1]], dtype=dtype)), 5, 7).tolist() == [6, 29]
    assert read_places(to_ref(torch.tensor([34, 0], dtype=dtype)), 5, 7).tolist() == [34, 0]


@pytest.mark.parametrize("bad", [[35], [-1], [[5], [0]], [[0], [7]], [[-1], [0]], [[0], [-1]]])
def test_places_outside_the_matrix(bad: list[int]) -> None:
    with pytest.raises(FormatError, match=r"a place outside what it points into: found .*, expected within \[5, 7\]"):
        read_places(to_ref(torch.tensor(bad)), 5, 7)


@pytest.mark.parametrize("bad", [1.5, float("nan"), float("inf")])
def test_places_that_are_no_whole_numbers(bad: float) -> None:
    with pytest.raises(FormatError, match="no whole numbers"):
        read_places(to_ref(torch.tensor([1.0, bad])), 5, 7)
