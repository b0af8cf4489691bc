"""Factors told from 1 or from 0: moved where nothing is rounded, else an error."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import NotExpressible
from loratools.formats._told import told_from
from loratools.tensors import read_tensor, to_ref


@pytest.mark.parametrize(
    ("values", "dtype", "code"),
    [
        ([0.75, 1.5], torch.float32, "F32"), ([1.0078125], torch.bfloat16, "BF16"), ([1.0], torch.bfloat16, "BF16"),
        ([1e-3], torch.float32, "F64"), ([2.0**-10], torch.bfloat16, "F32"),
    ],
)  # fmt: skip
def test_there_and_back(values: list[float], dtype: torch.dtype, code: str) -> None:
    ref = to_ref(torch.tensor(values).to(dtype))
    moved = told_from(ref, 0.0, 1.0)
    assert moved.spec.dtype == code
    assert torch.equal(1 + read_tensor(moved, torch.float64), read_tensor(ref, torch.float64))
    back = told_from(moved, 1.0, 0.0)
    assert torch.equal(read_tensor(back, torch.float64), read_tensor(ref, torch.float64))


def test_what_is_told_alike_is_the_tensor_itself_and_what_would_be_rounded_is_an_error() -> None:
    ref = to_ref(torch.tensor([1e-30]))
    assert told_from(ref, 1.0, 1.0) is ref
    with pytest.raises(NotExpressible, match=r"factors told from 0, which told from 1 no F64 holds exactly; .*--kind lora"):
        told_from(ref, 0.0, 1.0)
    with pytest.raises(NotExpressible, match=r"told from 1, which told from 0 no F32 holds exactly"):
        told_from(to_ref(torch.tensor([1e-3])), 1.0, 0.0, "F32")
