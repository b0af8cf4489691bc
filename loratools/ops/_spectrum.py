"""What the data of one delta measures by itself: its norm, the singular values of its factors, its magnitudes' range."""

from __future__ import annotations

from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.facts import low_rank
from loratools.ops._oddities import scan


def spectrum(delta: Delta) -> dict[str, Any]:
    """‖ΔW‖, singular values and effective rank of the factors' product; for DoRA of its direction, with the magnitudes' range."""
    import torch

    from loratools.linalg.product import effective_rank, product_svd
    from loratools.tensors import read_tensor

    measured: dict[str, Any] = {"norm": None, "effective_rank": None, "sigma": None}
    if any(scan(ref)[0] for ref in delta.refs().values()):
        return measured
    low = low_rank(delta)
    if low is not None:
        sigma = product_svd(*low.factors(), scale=low.scaling).S
        measured |= {"norm": float(torch.linalg.vector_norm(sigma)), "effective_rank": effective_rank(sigma), "sigma": sigma.tolist()}
    elif isinstance(delta, Full):
        measured["norm"] = delta.norm()
    if isinstance(delta, DoRA):
        magnitude = read_tensor(delta.magnitude, torch.float64)
        measured["magnitude"] = {"min": float(magnitude.min()), "max": float(magnitude.max())}
    return measured
