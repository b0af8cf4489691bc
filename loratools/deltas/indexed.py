"""Tensors that hold places: whole numbers within bounds, or an error that says which are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import FormatError
from loratools.tensorfile import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = ("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


def require_whole(*refs: Ref) -> None:
    """Raise FormatError for a tensor of places whose dtype is not one of whole numbers."""
    for ref in refs:
        if ref.spec.dtype not in WHOLE:
            raise FormatError("places are whole numbers", found=ref.spec, expected="an integer dtype")


def read_places(ref: Ref, count: int, device: str = "cpu") -> Tensor:
    """The places as int64, each from 0 to count − 1. Raises FormatError for any other.

    >>> import torch
    >>> from loratools.tensors import to_ref
    >>> read_places(to_ref(torch.tensor([2, 0], dtype=torch.uint8)), 3).tolist()
    [2, 0]
    """
    import torch

    found = read_tensor(ref, torch.int64, device)
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < count:
        there = f"{int(found.min())} to {int(found.max())}"
        raise FormatError("a place outside what it points into", found=there, expected=f"0 to {count - 1}")
    return found
