"""A number that a file keeps as a tensor of one element, such as an alpha: read without torch."""

from __future__ import annotations

import math
import struct

from loratools.errors import FormatError
from loratools.tensorfile import Ref

_CODES = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B", "BOOL": "<?"}


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
