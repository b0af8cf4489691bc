"""The routes that take the whole spectrum: float64 Gram and eigh, and LAPACK's SVD with a ladder below it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from loratools.errors import ConvergenceError
from loratools.linalg._leading import Leading, tail
from loratools.linalg._operator import Operator
from loratools.linalg._rules import Rule

Triple = tuple[Tensor, Tensor, Tensor]
_JITTER = (1e-13, 1e-11, 1e-9)


def spectrum(op: Operator) -> Tensor:
    """Every singular value of X from the float64 Gram matrix, falling, float64 on the CPU."""
    values: Tensor = torch.linalg.eigvalsh(_gram(op))
    return values.flip(0).clamp_min(0).sqrt().cpu()


def gram(op: Operator, rule: Rule) -> Leading:
    """Deterministic: V from eigh of XᵀX in float64, P = XV. Good to about 1e-8·‖X‖, the bound to 1e-6·‖X‖."""
    G = _gram(op)
    values, V = torch.linalg.eigh(G)
    values, V = values.flip(0).clamp_min(0).cpu(), V.flip(1)
    rank = rule.rank(values.sqrt(), op.norm**2)
    Q = V[:, :rank].contiguous()
    Z = torch.cat([block @ Q for block in op.blocks()])
    sigma = torch.linalg.vector_norm(Z, dim=0)
    P = _divide(Z, sigma)
    # Ky Fan: the sum of r eigenvalues moves by at most √r·‖ΔG‖_F; see spec/certificate.md, "The Gram route".
    slack = 8 * 2.0**-53 * (op.m + op.n) * math.sqrt(rank) * op.norm**2
    sigma, optimal = sigma.cpu(), math.sqrt(max(0.0, op.norm**2 - float(values[:rank].sum()) - slack))
    return Leading(P=P, sigma=sigma, Q=Q, optimal=optimal, expected=tail(op.norm**2, sigma, rank), method="gram")


def lapack(op: Operator, rule: Rule) -> Leading:
    """The whole SVD in float64 by the first rung that converges: gesdd, gesvd, eigh of the Gram matrix, gesdd after jitter."""
    X = torch.cat([block.clone() for block in op.blocks()])
    for name, attempt in _RUNGS.items():
        try:
            U, sigma, Vh = attempt(X)
        except (RuntimeError, ValueError, ImportError):  # torch's LinAlgError is a RuntimeError, numpy's a ValueError
            continue
        if bool(torch.isfinite(sigma).all()) and bool(torch.isfinite(U).all()) and bool(torch.isfinite(Vh).all()):
            sigma = sigma.cpu()
            rank = rule.rank(sigma, op.norm**2)
            optimal, expected = _tail(op, name, sigma, rank), float(torch.linalg.vector_norm(sigma[rank:]))
            return Leading(P=U[:, :rank], sigma=sigma[:rank], Q=Vh[:rank].T, optimal=optimal, expected=expected, method=name)
    raise ConvergenceError("the singular value decomposition converged on no rung", found=", ".join(_RUNGS))


def _gram(op: Operator) -> Tensor:
    G = torch.zeros(op.n, op.n, dtype=torch.float64, device=op.D.device)
    for block in op.blocks():
        G.addmm_(block.T, block)
    return G


def _divide(Z: Tensor, sigma: Tensor) -> Tensor:
    """Z / sigma by columns, 0 where sigma is 0."""
    return Z / torch.where(sigma > 0, sigma, 1.0)


def _tail(op: Operator, name: str, sigma: Tensor, rank: int) -> float:
    """√Σσ² beyond the rank, less what a backward error of 8(m + n)u·‖X‖, and the jitter, can have added (Mirsky)."""
    added = {"eigh": 1e-6, **{f"jitter {size:g}": 2 * size * math.sqrt(op.m * op.n) / op.norm for size in _JITTER}}.get(name, 0.0)
    slack = (8 * 2.0**-53 * (op.m + op.n) + added) * op.norm
    return max(0.0, float(torch.linalg.vector_norm(sigma[rank:])) - slack)


def _gesdd(X: Tensor) -> Triple:
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    return U, sigma, Vh


def _gesvd(X: Tensor) -> Triple:
    if X.is_cuda:
        U, sigma, Vh = torch.linalg.svd(X, full_matrices=False, driver="gesvd")
        return U, sigma, Vh
    linalg = importlib.import_module("scipy.linalg")  # torch and numpy offer only gesdd on the CPU; without scipy the next rung
    U, sigma, Vh = (torch.from_numpy(part) for part in linalg.svd(X.numpy(), full_matrices=False, lapack_driver="gesvd"))
    return U, sigma, Vh


def _eigh(X: Tensor) -> Triple:
    V = torch.linalg.eigh(X.T @ X)[1].flip(1)
    Z = X @ V
    sigma = torch.linalg.vector_norm(Z, dim=0)
    return _divide(Z, sigma), sigma, V.T


def _jittered(size: float) -> Callable[[Tensor], Triple]:
    def attempt(X: Tensor) -> Triple:
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(0), dtype=X.dtype).to(X.device)
        return _gesdd(X + size * noise)

    return attempt


_RUNGS: dict[str, Callable[[Tensor], Triple]] = {
    "gesdd": _gesdd,
    "gesvd": _gesvd,
    "eigh": _eigh,
    **{f"jitter {size:g}": _jittered(size) for size in _JITTER},
}
