"""Projected: a weight without its part in a small subspace of the outputs, and something else put there: DEFT and PaRa.

peft 0.21.2 `tuners/deft/layer.py`; PaRa: Chen et al. 2024 (arXiv:2406.05641).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Bound, Delta, Read, exact_rows, require_floating
from loratools.errors import NonFiniteError, OptionError, ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensorfile import file_of
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("relu", "qr")


@dataclass(frozen=True, eq=False, kw_only=True)
class Projected(Delta):
    """W′ = W + L·(scale·R − Nᵀ·W), P (out, r) and R (r, in·kernel) or none; L = P and N = relu(P), or L = N = Q of P = QR.

    Needs a pass over W. Raises ShapeError where they do not meet or do not fit, UnsupportedError for a P whose Q has no certain signs.
    """

    kind = "projected"

    P: Ref
    R: Ref | None = None
    scale: float = 1.0
    method: str = "relu"

    def __post_init__(self) -> None:
        p, r = self.P.spec.shape, None if self.R is None else self.R.spec.shape
        if self.method not in METHODS:
            raise OptionError("method", found=self.method, expected=" or ".join(METHODS))
        if len(p) != 2 or not 0 < p[1] <= p[0] or (r is not None and (len(r) != 2 or r[0] != p[1])):
            found = f"P {list(p)}" + ("" if r is None else f", R {list(r)}")
            raise ShapeError("the factors do not meet", found=found, expected="P [out, r], R [r, in], r at most out")

    def spec(self, base: Spec | None) -> Spec:
        rows, columns = self.P.spec.shape[0], None if self.R is None else self.R.spec.shape[1]
        if base is None or base.matrix[0] != rows or columns not in (None, base.matrix[1]):
            found = [rows] if columns is None else [rows, columns]
            raise ShapeError("does not fit the base's weight", found=found, expected=None if base is None else list(base.shape))
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def facts(self) -> dict[str, Any]:
        return {"rank": self.P.spec.shape[1], "scaling": self.scale}

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        from loratools.linalg.exact import from_left
        from loratools.linalg.norms import ROWS

        assert base is not None
        left, right = (X.to(device) for X in self.sides())
        inner = -from_left(right.T.contiguous(), read(ROWS), slices=3 if base.dtype == "F64" else 2)
        if self.R is not None:
            inner = read_tensor(self.R, torch.float64, device) * self.scale + inner
        dense = exact_rows(left, inner, base)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            return W.add_(dense(part))

        return rows

    def sides(self) -> tuple[Tensor, Tensor]:
        """(L, N), (out, r) each, in float64."""
        import torch

        from loratools.linalg.orthogonal import Undecided, householder

        P = read_tensor(self.P, torch.float64)
        if not torch.isfinite(P).all():
            raise NonFiniteError("a factor holds inf or nan", file=file_of(self.P))
        if self.method == "relu":
            return P, P.clamp_min(0)
        try:
            Q = householder(P, signs=self.R is not None)
        except Undecided as error:
            remedy = "rounding alone decides what peft makes of it: serve it with peft"
            raise UnsupportedError(f"a P that has no certain Q: {error}", file=file_of(self.P), remedy=remedy) from None
        return Q, Q
