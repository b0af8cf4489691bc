"""A delta applied to a weight in memory, in one block or in small ones: what tests of a single kind compare with plain algebra."""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.deltas.base import Delta
from loratools.refs import Spec
from loratools.statistics import Statistics
from loratools.stream import Applied, apply_blocks
from loratools.tensors import as_tensor, to_ref


def applied(delta: Delta, W: Tensor, *, dtype: str = "F64", block: int = 1 << 18) -> Tensor:
    """W′ in float64 (or another dtype), of a delta fitted to W, by blocks of about so many elements."""
    wide = W.double() if dtype == "F64" else W
    source = to_ref(wide)
    fitted = delta.fitted(source.spec)
    target = Spec(dtype, fitted.spec(source.spec).shape)
    blocks = apply_blocks(Applied(source, target, ((fitted, 1.0),), "cpu", block), Statistics((delta.kind,)), lambda _: None)
    return as_tensor(bytearray(b"".join(map(bytes, blocks))), target)


def blocks_agree(delta: Delta, W: Tensor) -> bool:
    """Whether the bytes are the same for one block, for blocks of a row or two, and for some between."""
    whole = applied(delta, W)
    width = max(1, W[0].numel()) if W.ndim else 1
    return all(torch.equal(whole, applied(delta, W, block=width * rows)) for rows in (1, 3, 8))
