"""Reflected: a weight's rows mirrored in one plane after another, a chain of Householder reflections: HRA.

Yuan et al. 2024 (arXiv:2405.17484); peft 0.21.2 `tuners/hra/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Bound, Delta, Read, require_floating
from loratools.errors import NonFiniteError, ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensorfile import file_of
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Reflected(Delta):
    """W′ = W·(I − 2u₁u₁ᵀ)·…·(I − 2uᵣuᵣᵀ) of U's columns (in·kernel, r), each divided by its norm.

    `orthogonal`: Gram and Schmidt's columns in their place. Raises ShapeError for a weight of other columns, NonFiniteError for a column
    of zeros, UnsupportedError for columns that depend on each other where they are to be made orthogonal.
    """

    kind = "hra"

    U: Ref
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if len(self.U.spec.shape) != 2 or not self.U.spec.numel:
            raise ShapeError("no normals of planes", found=list(self.U.spec.shape), expected="[in, r]")

    def spec(self, base: Spec | None) -> Spec:
        if base is None or base.matrix[1] != self.U.spec.shape[0]:
            found = None if base is None else base.matrix[1]
            raise ShapeError("mirrors other columns than the weight has", found=self.U.spec.shape[0], expected=found)
        require_floating(base, self.U.spec)
        return base

    def facts(self) -> dict[str, Any]:
        return {"rank": self.U.spec.shape[1]}

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        from loratools.linalg.exact import ExactRight

        assert base is not None
        normals, middle = (X.to(device) for X in self.factors())
        slices = 3 if base.dtype == "F64" else 2
        first, then = ExactRight(normals, slices=slices), ExactRight(ExactRight(normals.T, slices=3)(middle), slices=slices)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            return W.sub_(then(first(W)))

        return rows

    def factors(self) -> tuple[Tensor, Tensor]:
        """(N, T) in float64 with W′ = W − W·N·T·Nᵀ, N (in·kernel, r) of unit columns and T (r, r) upper triangular."""
        import torch

        from loratools.linalg.orthogonal import Undecided, gram_schmidt, lengths

        U = read_tensor(self.U, torch.float64)
        if not torch.isfinite(U).all() or not bool(lengths(U).all()):
            raise NonFiniteError("a plane's normal is zero, or holds inf or nan", file=file_of(self.U))
        if not self.orthogonal:
            N = U / lengths(U)
            return N, _chain(N)
        try:
            N = gram_schmidt(U)
        except Undecided as error:
            remedy = "rounding alone decides what peft makes of them: serve it with peft"
            raise UnsupportedError(f"normals that cannot be made orthogonal: {error}", file=file_of(self.U), remedy=remedy) from None
        return N, 2 * torch.eye(N.shape[1], dtype=N.dtype)


def _chain(N: Tensor) -> Tensor:
    """T of (I − 2n₁n₁ᵀ)·…·(I − 2nᵣnᵣᵀ) = I − N·T·Nᵀ (Schreiber and Van Loan 1989, the compact WY form), a column a reflection."""
    from loratools.linalg.norms import row_sums
    from loratools.linalg.orthogonal import dots

    T = N.new_zeros(N.shape[1], N.shape[1])
    for number in range(N.shape[1]):
        T[:, number] = -2 * row_sums(T * dots(N, N[:, number]))
        T[number, number] = 2
    return T
