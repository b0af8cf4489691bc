"""Numbers that a file keeps as a tensor, such as an alpha or a shape: read and written without torch."""

from __future__ import annotations

import math
import struct
import sys

from loratools.errors import FormatError
from loratools.refs import InMemory, Ref, Spec

_MOST = sys.float_info.max
_CODES = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B", "BOOL": "<?"}


def finite(value: object) -> bool:
    """Whether a value of a config is a number that a float can hold: JSON has NaN, Infinity and whole numbers of any length.

    >>> finite(3), finite(True), finite(float("nan")), finite(10**400)
    (True, False, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST <= value <= _MOST


def scalar(ref: Ref, what: str) -> float:
    """The tensor's one element. Raises FormatError for more of them, and for what is no finite number.

    >>> from loratools.tensorfile import InMemory, Spec
    >>> scalar(InMemory(Spec("BF16", ()), bytes.fromhex("803f")), "alpha")
    1.0
    """
    if ref.spec.numel != 1:
        raise FormatError(f"{what} is not one number", found=ref.spec)
    data = bytes(ref.read())
    if ref.spec.dtype == "BF16":
        value = struct.unpack("<f", b"\0\0" + data)[0]
    elif ref.spec.dtype in _CODES:
        value = struct.unpack(_CODES[ref.spec.dtype], data)[0]
    else:
        raise FormatError(f"{what} is not a number that can be read", found=ref.spec)
    if not math.isfinite(value):
        raise FormatError(f"{what} is not finite", found=value)
    return float(value)


def whole_numbers(ref: Ref, what: str) -> tuple[int, ...]:
    """A vector of natural numbers. Raises FormatError for any other tensor.

    >>> whole_numbers(InMemory(Spec("I32", (2,)), struct.pack("<2i", 3, 4)), "shape")
    (3, 4)
    """
    if len(ref.spec.shape) != 1 or ref.spec.dtype not in ("I64", "I32") or ref.spec.numel > 8:
        raise FormatError(f"{what} is no short vector of whole numbers", found=ref.spec)
    values = struct.unpack(f"<{ref.spec.numel}{_CODES[ref.spec.dtype][1]}", bytes(ref.read()))
    if not values or min(values) < 1:
        raise FormatError(f"{what} has a number below 1", found=list(values))
    return tuple(values)


def number(value: float) -> Ref:
    """A number as a tensor without axes: float32 where that holds it exactly, else float64."""
    narrow = as_float32(value)
    return InMemory(Spec("F32", ()), struct.pack("<f", value)) if narrow == value else InMemory(Spec("F64", ()), struct.pack("<d", value))


def as_float32(value: float) -> float:
    """The nearest float32, inf where there is none.

    >>> as_float32(0.5), as_float32(1e300)
    (0.5, inf)
    """
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
