"""The inverse of a square matrix, or an error where it would be a matter of the last bits."""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import NonFiniteError, UnsupportedError

WORST = 1e10  # a condition from which on the last bits of a processor would show in a float32 result


def inverse(X: Tensor) -> Tensor:
    """X⁻¹ (n, n) in float64. The library eliminates in an order of its own: its bits are those of a machine and its number of threads.

    Raises NonFiniteError for inf or nan, UnsupportedError for a matrix that is singular or as good as that.

    >>> inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0]])).tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """
    wide = X.to(torch.float64)
    if not torch.isfinite(wide).all():
        raise NonFiniteError("a matrix to invert holds inf or nan")
    found: Tensor
    found, singular = torch.linalg.inv_ex(wide)
    condition = float("inf") if int(singular) else float(wide.norm() * found.norm())
    if not condition < WORST:
        raise UnsupportedError("a matrix that has to be inverted is as good as singular", found=f"a condition of {condition:.0e}")
    return found
