"""Tensors that hold places: whole numbers within bounds, or an error that says which are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from loratools.errors import FormatError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = ("U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


def require_whole(*refs: Ref) -> None:
    """Raise FormatError for a tensor of places whose dtype is not one of whole numbers."""
    for ref in refs:
        if ref.spec.dtype not in WHOLE:
            raise FormatError("places are whole numbers", found=ref.spec, expected="an integer dtype")


def read_places(ref: Ref, *sizes: int, device: str = "cpu") -> Tensor:
    """The places as int64, each from 0 to size − 1; of a matrix of two sizes counted row by row, one number each or a pair (2, n).

    Whole numbers in a floating dtype are read, too. Raises FormatError for others, and for places beyond the sizes.

    >>> import torch
    >>> from loratools.tensors import to_ref
    >>> read_places(to_ref(torch.tensor([2, 0], dtype=torch.uint8)), 3).tolist()
    [2, 0]
    >>> read_places(to_ref(torch.tensor([[0, 4], [6, 1]])), 5, 7).tolist()
    [6, 29]
    """
    import torch

    raw = read_tensor(ref, device=device)
    found = raw.to(torch.int64)
    if raw.is_floating_point() and not torch.equal(found.to(raw.dtype), raw):
        raise FormatError("places that are no whole numbers", found=str(ref.spec))
    pairs = len(sizes) > 1 and found.ndim == 2
    limits = torch.tensor([[size] for size in sizes] if pairs else math.prod(sizes), device=device)
    if bool(((found < 0) | (found >= limits)).any()):
        there = f"{int(found.min())} to {int(found.max())}"
        raise FormatError("a place outside what it points into", found=there, expected=_within(sizes))
    return found[0] * sizes[1] + found[1] if pairs else found


def _within(sizes: tuple[int, ...]) -> str:
    return f"0 to {sizes[0] - 1}" if len(sizes) == 1 else f"within {list(sizes)}"
