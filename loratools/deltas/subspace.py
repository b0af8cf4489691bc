"""Subspace: a weight's smallest singular directions replaced by trained ones: OSF.

Nayak et al. 2025 (arXiv:2504.07097); peft 0.21.2 `tuners/osf/layer.py`, which decomposes the base anew where the adapter is loaded and
saves what takes the place of the smallest. The parts are sums of whole directions, so their signs do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Bound, Delta, Read, exact_rows, require_floating
from loratools.errors import ConvergenceError, NonFiniteError, ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensorfile import file_of
from loratools.tensors import read_tensor, torch_dtype
from loratools.threads import single_threaded_blas

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKWARD = 4 * 2.0**-24  # what a float32 decomposition, in which adapters are trained, may be off by, as a share of the largest value
TOLERATED = 0.05  # as a share of the change, and below LEAST of the weight in any case
LEAST = 1e-5


@dataclass(frozen=True, eq=False, kw_only=True)
class Subspace(Delta):
    """W′ = W − Σ σᵢuᵢvᵢᵀ over the q smallest singular values + U·diag(S)·V, U (out, q), S (q), V (q, in).

    `stored` is the weight's own dtype, filled in once a base is met: where it has 16 bits, u·σ and v are rounded to it as in training.
    It sees the whole weight. Raises ShapeError where the parts do not meet or fit, and UnsupportedError where the least value that is
    kept and the largest that is replaced are so near that float32 does not tell their directions apart.
    """

    kind = "osf"

    U: Ref
    S: Ref
    V: Ref
    stored: str | None = None

    def __post_init__(self) -> None:
        u, s, v = (ref.spec.shape for ref in (self.U, self.S, self.V))
        if [len(u), len(s), len(v)] != [2, 1, 2] or (u[1], v[0]) != (*s, *s) or s[0] > min(u[0], v[1]):
            found = f"U {list(u)}, S {list(s)}, V {list(v)}"
            raise ShapeError("the singular vectors and values do not meet", found=found, expected="U [out, q], S [q], V [q, in]")

    @property
    def kept(self) -> int:
        """How many singular values stay."""
        return min(self.U.spec.shape[0], self.V.spec.shape[1]) - self.S.spec.numel

    def spec(self, base: Spec | None) -> Spec:
        shape = (self.U.spec.shape[0], self.V.spec.shape[1])
        if base is None or base.shape != shape:
            raise ShapeError("does not fit the base's weight", found=list(shape), expected=None if base is None else list(base.shape))
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def fitted(self, base: Spec) -> Self:
        return replace(self, stored=base.dtype)

    @property
    def align(self) -> int | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"rank": self.S.spec.numel}

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        new, whole = self._new(base), base.matrix[0]

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None and part == slice(0, whole)
            held = W.cpu()
            result = held + (new - self._old(held, new, base))
            return W.copy_(result)

        return rows

    def _new(self, base: Spec) -> Tensor:
        import torch

        U, S, V = (read_tensor(ref, torch.float64) for ref in (self.U, self.S, self.V))
        return exact_rows(U * S, V, base)(slice(0, len(U)))

    def _old(self, W: Tensor, new: Tensor, base: Spec) -> Tensor:
        """What is taken out of W."""
        U, S, Vh = _decomposed(W, self.U)
        left, right = U[:, self.kept :] * S[self.kept :], Vh[self.kept :]
        if self.stored in ("BF16", "F16"):
            dtype = torch_dtype(self.stored)
            left, right = _rounded(U[:, self.kept :], dtype) * _rounded(S[self.kept :], dtype), _rounded(right, dtype)
            left = _rounded(left, dtype)
        old = exact_rows(left, right, base)(slice(0, len(U)))
        self._check_apart(S, float((new - old).norm()), float(W.norm()))
        return old

    def _check_apart(self, S: Tensor, change: float, norm: float) -> None:
        """Turning the two neighbours by the angle that float32 leaves open moves the sum of the smallest by √2·σ times that angle."""
        if not 0 < self.kept < len(S) or not float(S[self.kept - 1]):
            return
        largest, last, first = float(S[0]), float(S[self.kept - 1]), float(S[self.kept])
        unsure = math.sqrt(2) * last * min(1.0, BACKWARD * largest / max(last - first, 1e-300))
        if unsure > TOLERATED * change and unsure > LEAST * norm:
            found = f"{last:.9g} and {first:.9g}" + (f", which leave {unsure / change:.1%} of the change open" if change else "")
            fact = f"the base's singular values {self.kept} and {self.kept + 1} are too near to tell what was kept in training"
            raise UnsupportedError(fact, file=file_of(self.U), found=found, remedy="merge it with peft where it was trained")


def _decomposed(W: Tensor, ref: Ref) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    if not torch.isfinite(W).all():
        raise NonFiniteError("a weight holds inf or nan")
    try:
        with single_threaded_blas():  # so that the bits do not depend on how many threads there are
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    except RuntimeError as error:
        raise ConvergenceError(f"the base's singular value decomposition did not converge: {error}", file=file_of(ref)) from None
    return U, S, Vh


def _rounded(X: Tensor, dtype: torch.dtype) -> Tensor:
    """X as it is stored, once it has gone through float32, in which it is decomposed in training."""
    import torch

    return X.to(torch.float32).to(dtype).to(torch.float64)
