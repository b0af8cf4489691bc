"""A factor with a core before its kernel, Σⱼ t[i, j, …]·w[j, c], as LoHa, LoKr and LoCon use it (Tucker), in exact products."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def cored(t: Tensor, w: Tensor) -> Tensor:
    """t (r, s, *kernel) on w (s, in) as (r, in·kernel) in float64, the same bits on any machine.

    >>> import torch
    >>> cored(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 4.0]])).tolist()
    [[3.0, 6.0, 4.0, 8.0]]
    """
    from loratools.linalg.blocks import multiplied

    rank, inner = t.shape[:2]
    found = multiplied(t.reshape(rank, inner, -1).transpose(1, 2).reshape(-1, inner), w)  # (r·kernel, in)
    return found.reshape(rank, -1, w.shape[1]).transpose(1, 2).flatten(1)
