"""The header of a safetensors file: parsed, every lie in it told, and built as the safetensors library builds it.

Specification: https://github.com/huggingface/safetensors#format. A file is `u64 LE n | n bytes of JSON | data`; the JSON maps
names to `{"dtype", "shape", "data_offsets"}` relative to the end of the header, without holes or overlaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loratools.errors import FormatError, LoratoolsError, raise_all
from loratools.refs import BITS, Spec

HEADER_LIMIT = 100_000_000
_SIZES = 1 << 60  # beyond what any file holds


def parse_header(header: bytes, data_bytes: int) -> tuple[dict[str, tuple[Spec, int]], dict[str, str]]:
    """The header's tensors as name → (spec, begin) in the order of their bytes, and its metadata; every fault is collected."""
    if header[:1] != b"{":
        raise FormatError("not a safetensors file: the header does not begin with '{'")
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the header is not JSON: {error}") from None
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null, which safetensors' own reader takes for none
    if not isinstance(metadata, dict) or not all(_text(part) for pair in metadata.items() for part in pair):
        raise FormatError("the header's __metadata__ must map strings to strings")
    faults: list[LoratoolsError] = []
    entries = {}
    for name, entry in table.items():
        try:
            if not _text(name):
                raise FormatError("a name that is not Unicode text")
            entries[name] = _entry(entry)
        except FormatError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    ordered = sorted(entries.items(), key=lambda item: item[1][1:])
    end = 0
    for name, (_, begin, stop) in ordered:
        if begin != end:
            raise FormatError("data_offsets leave a hole or overlap", tensor=name, found=begin, expected=end)
        end = stop
    if end != data_bytes:
        lacking = "truncated: the file ends before its tensors do" if end > data_bytes else "bytes after the last tensor"
        raise FormatError(lacking, found=f"{data_bytes} bytes of data", expected=end)
    return {name: (spec, begin) for name, (spec, begin, _) in ordered}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError("the header names something twice", tensor=twice)
    return table


def _entry(entry: Any) -> tuple[Spec, int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("a header entry needs exactly dtype, shape and data_offsets", found=json.dumps(entry)[:80])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError("unknown dtype", found=json.dumps(dtype), expected="one of " + " ".join(BITS))
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise FormatError("shape and data_offsets must be lists of natural numbers", found=f"{shape}, {offsets}"[:80])
    count = 1
    for size in shape:
        count *= size
        if count >= _SIZES:
            raise FormatError("its shape has more elements than a file can hold", found=f"{shape}"[:80])
    spec = Spec(dtype, tuple(shape))
    bits = spec.numel * BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise FormatError(
            "data_offsets do not fit dtype and shape", found=f"{offsets[1] - offsets[0]} bytes", expected=f"{bits / 8:g} for {spec}"
        )
    return spec, offsets[0], offsets[1]


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _SIZES for value in values)


def _text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON's escapes can spell half a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def build_header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """The header's bytes, padded to a multiple of 8 as safetensors pads it, each tensor's offset, and where the data ends."""
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offsets, end = {}, 0
    for name, spec in specs.items():
        if name == "__metadata__":
            raise FormatError("a tensor cannot have this name", tensor=name)
        offsets[name] = end
        end += spec.nbytes
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8), offsets, end


def canonical(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The order the safetensors library writes: wider dtypes first, so that every tensor is aligned, then by name."""
    return dict(sorted(specs.items(), key=lambda item: (-list(BITS).index(item[1].dtype), item[0])))
