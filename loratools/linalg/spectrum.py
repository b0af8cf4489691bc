"""The leading singular values of a dense matrix, for choosing ranks before anything is factored."""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import OptionError
from loratools.linalg import _dense
from loratools.linalg._krylov import Krylov
from loratools.linalg._operator import Operator

_SMALL = 512  # short sides up to this take every singular value from the Gram matrix


def spectrum(D: Tensor, *, top: int, tolerance: float = 1e-4, seed: int = 0) -> tuple[Tensor, float]:
    """The `top` largest singular values of D (m, n), falling, float64 on the CPU, and ‖D‖_F.

    Sums of their squares are good to about `tolerance` relative, by the Ritz residuals; this is an estimate for choosing ranks, not
    a certificate. D is float32 or float64. Raises NonFiniteError for inf or nan.

    >>> sigma, norm = spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0])), top=2)
    >>> [round(value, 6) for value in sigma.tolist()], round(norm**2, 6)
    ([3.0, 2.0], 14.0)
    """
    if top < 1:
        raise OptionError("singular values", found=top, expected="1 or more")
    op = Operator(D)
    top = min(top, op.n)
    if op.norm == 0:
        return torch.zeros(top, dtype=torch.float64), 0.0
    values = None if op.n <= _SMALL or 6 * top > op.n or not op.plain else _ritz_values(op, top, tolerance, seed)
    sigma = _dense.spectrum(op) if values is None else values
    return sigma[:top] * op.unit, op.norm * op.unit


def _ritz_values(op: Operator, top: int, tolerance: float, seed: int) -> Tensor | None:
    """Singular values from a Krylov space, or None where it would grow past a third of the short side."""
    block = min(48, top + 8)
    basis = Krylov(op, block, torch.Generator().manual_seed(seed))
    while basis.dim + 2 * block <= op.n // 2 and op.passes < op.n // 8:
        basis.extend()
        if basis.dim < top + block:
            continue
        theta, residual, _ = basis.ritz()
        head, rest = theta[:top], residual[:top]
        # An eigenvalue is at most s²/gap, and never more than s, above its Ritz value; the gap is to what lies well beyond `top`.
        gap = (head - theta[min(top + block // 2, theta.numel() - 1)]).clamp_min(1e-300)
        missing = torch.minimum(rest, rest.square() / gap)
        if bool((missing.cumsum(0) <= tolerance * head.cumsum(0)).all()):
            return (head + rest.square() / head.clamp_min(1e-300)).clamp_max(op.norm**2).sqrt()
    return None
