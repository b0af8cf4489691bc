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
        size = torch.linalg.matrix_norm(W)
        W, H = self._orthogonal(W)
        W, again = self._orthogonal(W)
        fresh, R = self._normalized(W, size)
        self.next, self.coupling = fresh, R.double().cpu()
        self._project((H + again).double().cpu())

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values in falling order, the norm of each residual, and the vectors' coordinates in Q, float64 on the CPU."""
        theta, Y = torch.linalg.eigh(self.T)
        theta, Y = theta.flip(0).clamp_min(0), Y.flip(1)
        residual = torch.linalg.vector_norm(self.coupling @ Y[-self.coupling.shape[1] :], dim=0)
        return theta, residual, Y

    def _normalized(self, W: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """QR of W, orthogonal to Q to rounding of the `size` it had, with columns that are so whatever is left of it."""
        fresh, R = torch.linalg.qr(W)
        diagonal = R.diagonal().abs()
        sound = bool(diagonal.min() > 0.05 * diagonal.max()) and bool(diagonal.max() > 1e-3 * size)
        for _ in range(0 if sound else 6):
            # Few distinct singular values: columns of W are rounding noise, and what QR makes of them lies partly, or wholly, in Q.
            fresh, correction = torch.linalg.qr(self._orthogonal(fresh)[0])
            R = correction @ R
            if bool(correction.diagonal().abs().min() > 0.5):
                break
        return fresh, R

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
