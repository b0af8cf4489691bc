"""Files of tensors as the safetensors library makes them, and as loratools does; any tensors to put in them."""

from __future__ import annotations

import ctypes
import json
import random
import struct
from pathlib import Path

from hypothesis import strategies as st
from safetensors import TensorSpec, serialize

from loratools.refs import BITS, Spec
from loratools.tensorwriter import TensorWriter

# the safetensors library's names for what it can write; it reads the two F6 dtypes but has no name to write them by
LIBRARY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
WHOLE = tuple(dtype for dtype in LIBRARY if dtype != "F4")
Tensors = dict[str, tuple[Spec, bytes]]


@st.composite
def specs(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(BITS)) -> Spec:
    """Any dtype, any shape of up to three axes, empty and 0-d ones among them, that fills whole bytes."""
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    while BITS[dtype] < 8 and Spec(dtype, shape).numel * BITS[dtype] % 8:
        shape = (*shape, 4)
    return Spec(dtype, shape if shape or BITS[dtype] >= 8 else (4,))


def tensors_of(dtypes: tuple[str, ...] = tuple(BITS)) -> st.SearchStrategy[Tensors]:
    """A few tensors by name."""
    # Cs: no half surrogate pairs, which UTF-8 cannot hold; all else is a name, quotes and newlines too
    name = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda text: text != "__metadata__")
    return st.dictionaries(name, specs(dtypes), max_size=6).map(
        lambda table: {name: (spec, random.Random(repr(name)).randbytes(spec.nbytes)) for name, spec in table.items()}
    )


def library_bytes(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """The file the safetensors library makes of these tensors."""
    kept, described = [], {}
    for name, (spec, data) in tensors.items():
        buffer = ctypes.create_string_buffer(data, max(1, len(data)))
        kept.append(buffer)
        shape = [*spec.shape[:-1], spec.shape[-1] // 2] if spec.dtype == "F4" else list(spec.shape)
        described[name] = TensorSpec(dtype=LIBRARY[spec.dtype], shape=shape, data_ptr=ctypes.addressof(buffer), data_len=len(data))
    return bytes(serialize(described, metadata))


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> TensorWriter:
    """The file that loratools makes of these tensors, in two blocks each."""
    path.unlink(missing_ok=True)
    writer = TensorWriter(path, {name: spec for name, (spec, _) in tensors.items()}, metadata)
    for name, (_, data) in tensors.items():
        writer.write(name, [data[:3], data[3:]])
    writer.close()
    return writer


def file_of(path: Path, header: object, data: bytes = b"") -> Path:
    """A file of any header, JSON or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
