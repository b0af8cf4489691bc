"""Places: whole numbers within bounds."""

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
