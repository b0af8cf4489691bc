"""Floating-point numbers as ordered integers: neighbours in value are neighbours in number.

IEEE 754 stores sign and magnitude, so the bits of a non-negative number already count upwards; a negative one is mirrored.
−0 and +0 are neighbours, not equals: bits are what is compared here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.refs import BITS, Buffer, Spec
from loratools.tensors import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

_SIGNED = {8: "I8", 16: "I16", 32: "I32", 64: "I64"}


def ordered(data: Buffer, dtype: str) -> Tensor:
    """The numbers of a buffer as int64, in the order of their values: 0 is +0, −1 is −0.

    >>> ordered(bytes.fromhex("0000 0080 0100 0180"), "BF16").tolist()
    [0, -1, 1, -2]
    """
    import torch

    bits = BITS[dtype]
    view = as_tensor(bytearray(data), Spec(_SIGNED[bits], (len(data) * 8 // bits,))).to(torch.int64)
    lowest = -(1 << (bits - 1)) if bits < 64 else torch.iinfo(torch.int64).min
    return torch.where(view < 0, lowest - view - 1, view)


def from_ordered(numbers: Tensor, dtype: str) -> bytes:
    """The buffer whose ordered integers these are.

    >>> from_ordered(ordered(bytes.fromhex("0180"), "BF16") + 1, "BF16").hex()
    '0080'
    """
    import torch

    bits = BITS[dtype]
    lowest = -(1 << (bits - 1)) if bits < 64 else torch.iinfo(torch.int64).min
    view = torch.where(numbers < 0, lowest - numbers - 1, numbers)
    return view.to(getattr(torch, f"int{bits}")).numpy().tobytes()


def distance(one: Buffer, other: Buffer, dtype: str) -> Tensor:
    """How many units in the last place apart, for each number; −0 and +0 are 0 apart.

    >>> distance(bytes.fromhex("803f"), bytes.fromhex("823f"), "BF16").tolist()
    [2]
    """
    import torch

    a, b = ordered(one, dtype), ordered(other, dtype)
    a, b = torch.where(a < 0, a + 1, a), torch.where(b < 0, b + 1, b)
    # |a| + |b| of opposite signs stays below 2**64 and so may pass int64's end: such a pair is capped there
    apart = torch.where((a < 0) == (b < 0), (a - b).abs(), a.abs() + b.abs())
    return torch.where(apart < 0, torch.iinfo(torch.int64).max, apart)
