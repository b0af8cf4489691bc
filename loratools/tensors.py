"""Bytes to torch and back: the one place where a dtype's name in a header meets torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import FormatError, UsageError
from loratools.refs import FLOATS, Buffer, InMemory, Ref, Spec

if TYPE_CHECKING:
    import torch

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64",
}  # fmt: skip
_CODES = {name: code for code, name in _NAMES.items()}


def torch_dtype(code: str) -> torch.dtype:
    """torch's dtype for a safetensors dtype; FormatError for those torch lacks."""
    import torch

    found = getattr(torch, _NAMES.get(code, "?"), None)
    if not isinstance(found, torch.dtype):
        raise FormatError("torch has no such dtype", found=code)
    return found


def code_of(dtype: torch.dtype) -> str | None:
    """The safetensors name of torch's dtype, or None for those it lacks."""
    return _CODES.get(str(dtype).removeprefix("torch."))


def dtype_code(name: str) -> str:
    """The safetensors code of a floating dtype a user named: `bfloat16`, `bf16`, `BF16`, …

    >>> dtype_code("bf16")
    'BF16'
    """
    short = {"half": "F16", "float": "F32", "double": "F64", "fp16": "F16", "fp32": "F32", "fp64": "F64"}
    code = _CODES.get(name, short.get(name, name.upper()))
    if code not in FLOATS:
        raise UsageError("unknown --dtype", found=name, expected="float64, float32, float16 or bfloat16")
    return code


def as_tensor(data: Buffer, spec: Spec) -> torch.Tensor:
    """A tensor over the bytes themselves, writable if they are."""
    import torch

    if not spec.numel:
        return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).view(spec.shape)


def read_tensor(ref: Ref, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
    """The whole tensor, in its own dtype or another."""
    data = ref.read()
    data = bytearray(data) if memoryview(data).readonly else data
    return as_tensor(data, ref.spec).to(device=device, dtype=dtype or torch_dtype(ref.spec.dtype))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # view(-1) keeps the stride of a single element
    return flat.view(torch.uint8).numpy().data


def to_ref(tensor: torch.Tensor) -> Ref:
    """A tensor in memory as a `Ref`.

    >>> import torch
    >>> to_ref(torch.zeros(2, 3)).spec
    Spec(dtype='F32', shape=(2, 3), encoding=None)
    """
    kept = tensor.detach().cpu().contiguous()
    return InMemory(Spec(_CODES[str(kept.dtype).removeprefix("torch.")], tuple(kept.shape)), tensor_bytes(kept))
