"""Block Krylov with full reorthogonalisation: where the leading right singular vectors of a tall X are found.

Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular value decomposition", 2015.
Nothing here is trusted: `_certificate` judges the space from fresh float64 products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.linalg._operator import Operator


class Krylov:
    """An orthonormal basis of the span of (XᵀX)ᵏXᵀΩ, k = 0, 1, …, with XᵀX projected onto it.

    `Q` (n, dim) in X's dtype, `T` = QᵀXᵀXQ (dim, dim) in float64 on the CPU.
    """

    def __init__(self, op: Operator, block: int, generator: torch.Generator) -> None:
        self.op = op
        start = torch.randn(op.m, block, generator=generator, dtype=op.D.dtype).to(op.D.device)
        self.next = torch.linalg.qr(op.back(start))[0]
        self.Q = self.next[:, :0]
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.coupling = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def dim(self) -> int:
        """Columns of Q."""
        return int(self.Q.shape[1])

    def extend(self) -> None:
        """One more block: two passes."""
        block = self.next
        self.Q = torch.cat([self.Q, block], dim=1)
        W = self.op.back(self.op.forward(block))
        W, H = self._orthogonal(W)
        W, again = self._orthogonal(W)
        fresh, R = torch.linalg.qr(W)
        diagonal = R.diagonal().abs()
        if bool(diagonal.min() <= 0.05 * diagonal.max()):
            # Few distinct singular values: some columns of W are rounding noise, and their directions after QR are not
            # orthogonal to Q at all unless they are made so.
            fresh, correction = torch.linalg.qr(self._orthogonal(fresh)[0])
            R = correction @ R
        self.next, self.coupling = fresh, R.double().cpu()
        self._project((H + again).double().cpu())

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values in falling order, the norm of each residual, and the vectors' coordinates in Q, float64 on the CPU."""
        theta, Y = torch.linalg.eigh(self.T)
        theta, Y = theta.flip(0).clamp_min(0), Y.flip(1)
        residual = torch.linalg.vector_norm(self.coupling @ Y[-self.coupling.shape[1] :], dim=0)
        return theta, residual, Y

    def _orthogonal(self, W: Tensor) -> tuple[Tensor, Tensor]:
        coefficients = self.Q.T @ W
        return W.addmm(self.Q, coefficients, alpha=-1), coefficients

    def _project(self, H: Tensor) -> None:
        old, new = self.T.shape[0], H.shape[0]
        T = torch.empty(new, new, dtype=torch.float64)
        T[:old, :old] = self.T
        T[:, old:], T[old:, :old] = H, H[:old].T
        T[old:, old:] = (H[old:] + H[old:].T) / 2
        self.T = T
