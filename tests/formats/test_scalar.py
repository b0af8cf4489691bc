"""Numbers kept as tensors, read without torch, in every dtype that files hold them in."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import FormatError
from loratools.formats._scalar import scalar
from loratools.tensors import to_ref

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert scalar(to_ref(torch.full(shape, 8, dtype=dtype)), "alpha") == 8.0


def test_flags() -> None:
    assert scalar(to_ref(torch.tensor(True)), "on_input") == 1.0


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(2), "not one number"), (torch.tensor(float("nan")), "not finite"), (torch.tensor(float("inf")), "not finite"),
        (torch.tensor(1j), "not a number that can be read"),
    ],
)  # fmt: skip
def test_what_is_no_number(tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        scalar(to_ref(tensor), "alpha")
