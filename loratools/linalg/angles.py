"""Principal angles between subspaces (Jordan 1875; Björck, Golub, "Numerical methods for computing angles between linear
subspaces", Mathematics of Computation 27, 1973).

The cosines are the singular values of UᵀV; below 45° they are flat, so there the sines are taken, of V − U(UᵀV), which keep
small angles to 1e-15 where an arc cosine keeps them to 1e-8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import OptionError


def principal_angles(U: Tensor, V: Tensor) -> Tensor:
    """The min(p, q) angles in radians, rising, between the spaces of orthonormal columns U (m, p) and V (m, q), in float64.

    >>> one, other = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.6], [0.8]])
    >>> round(principal_angles(one, other).item(), 6)
    0.927295
    """
    if U.ndim != 2 or V.ndim != 2 or U.shape[0] != V.shape[0]:
        raise OptionError("subspaces do not fit", found=f"U {tuple(U.shape)}, V {tuple(V.shape)}", expected="U (m, p), V (m, q)")
    U, V = U.to(torch.float64), V.to(torch.float64)
    if V.shape[1] > U.shape[1]:
        U, V = V, U
    if not V.shape[1]:
        return torch.zeros(0, dtype=torch.float64)
    inner = U.T @ V
    _, cosines, directions = torch.linalg.svd(inner, full_matrices=False)
    # the sine that goes with each cosine: what is left of the same direction of V beside U
    sines = torch.linalg.vector_norm((V - U @ inner) @ directions.T, dim=0)
    return torch.atan2(sines, cosines)
