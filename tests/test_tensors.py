"""tensors: torch and bytes agree for every dtype torch has, and the rest are refused by name."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import FormatError, OptionError
from loratools.refs import BITS, Spec
from loratools.tensors import as_tensor, dtype_code, read_tensor, tensor_bytes, to_ref, torch_dtype
from tests.files import raw

LACKING = ("F4", "F6_E2M3", "F6_E3M2")  # torch 2.13 has no dtype of one element for them


@pytest.mark.parametrize("code", [code for code in BITS if code not in LACKING])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3), (2, 0)])
def test_bytes_come_back_for_every_dtype(code: str, shape: tuple[int, ...]) -> None:
    dtype = torch_dtype(code)
    assert dtype.itemsize * 8 == BITS[code]
    count = Spec(code, shape).nbytes
    data = bytearray(index % 2 if code == "BOOL" else index * 37 % 256 for index in range(count))
    tensor = as_tensor(data, Spec(code, shape))
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    ref = to_ref(tensor)
    assert ref.spec == Spec(code, shape)
    assert bytes(ref.read()) == bytes(data) == bytes(tensor_bytes(tensor))


@pytest.mark.parametrize("code", LACKING)
def test_a_dtype_torch_lacks_is_named(code: str) -> None:
    with pytest.raises(FormatError, match=code):
        torch_dtype(code)


def test_a_tensor_is_written_as_it_looks_not_as_it_lies() -> None:
    matrix = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    for view in (matrix.T, matrix[:, 1:], matrix[::2], torch.nn.Parameter(matrix).t(), matrix.expand(2, 2, 3)):
        ref = to_ref(view)
        assert bytes(ref.read()) == raw(view.detach().clone())
        assert ref.spec.shape == tuple(view.shape)


def test_reading_widens_and_copies() -> None:
    source = torch.tensor([1.0, -0.0, 65504.0], dtype=torch.float16)
    wide = read_tensor(to_ref(source), torch.float64)
    assert raw(wide) == raw(source.double())
    again = read_tensor(to_ref(torch.tensor([1.0])))
    again.add_(1)
    assert again.item() == 2


@pytest.mark.parametrize(
    ("name", "code"),
    [("bf16", "BF16"), ("bfloat16", "BF16"), ("fp16", "F16"), ("half", "F16"), ("f32", "F32"), ("float", "F32"), ("float64", "F64")],
)
def test_a_users_dtype(name: str, code: str) -> None:
    assert dtype_code(name) == code


@pytest.mark.parametrize("name", ["int8", "fp8", "F8_E4M3", "", "bf 16", "bool"])
def test_a_dtype_weights_are_not_written_in(name: str) -> None:
    with pytest.raises(OptionError, match="--dtype"):
        dtype_code(name)
