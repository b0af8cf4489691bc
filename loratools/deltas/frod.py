"""FRoD: W′ = U·(S + L)·Vᵀ, a basis V that layers of one kind share, the base's own U, a sparse S and a diagonal L that are trained.

AAAI 2026 (doi:10.1609/aaai.v40i31.39813); peft 0.21.2 `tuners/frod/layer.py`. U is not in the file: U·diag(l) = W·V⁻ᵀ with columns of
length 1, so S = 0 and L = diag(l) give W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.base import Bound, Delta, Read, require_floating
from loratools.deltas.indexed import read_places, require_whole
from loratools.errors import FormatError, ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor
from loratools.threads import single_threaded_blas

if TYPE_CHECKING:
    from torch import Tensor

_ZERO = 1e-12  # columns of U·L that are shorter belong to nothing: peft leaves them 0


@dataclass(frozen=True, eq=False, kw_only=True)
class FRoD(Delta):
    """W′ = U·(S + diag(l))·Vᵀ, V (in, in), l (in), S (in, in) by its `places` (2, n) and `values` (n); `size` (2) says [in, in].

    It needs all of W twice: first for the lengths of the columns of W·V⁻ᵀ. Raises ShapeError when the parts do not meet, FormatError for
    places that are no whole numbers, and later for those outside or named twice.
    """

    kind = "frod"

    V: Ref
    l: Ref  # noqa: E741
    values: Ref
    places: Ref
    size: Ref

    def __post_init__(self) -> None:
        V, l, values, places, size = (ref.spec.shape for ref in (self.V, self.l, self.values, self.places, self.size))  # noqa: E741
        if len(l) != 1 or len(values) != 1 or (*l, *l) != V or places != (2, *values) or size != (2,):
            found = f"V {list(V)}, l {list(l)}, values {list(values)}, places {list(places)}, size {list(size)}"
            expected = "V [in, in], l [in], values [n], places [2, n], size [2]"
            raise ShapeError("the basis and what is trained of it do not meet", found=found, expected=expected)
        require_whole(self.places, self.size)

    def spec(self, base: Spec | None) -> Spec:
        width = self.l.spec.numel
        if base is None or len(base.shape) != 2 or base.shape[1] != width:
            raise ShapeError("does not fit the base's weight", found=None if base is None else list(base.shape), expected=f"[out, {width}]")
        require_floating(base, *(ref.spec for ref in (self.V, self.l, self.values)))
        return base

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        from loratools.linalg.exact import ExactProduct, ExactRight
        from loratools.linalg.norms import ROWS, column_squares
        from loratools.linalg.solve import inverse

        V = read_tensor(self.V, torch.float64, device)
        with single_threaded_blas():
            coordinates = ExactRight(inverse(V).T.contiguous(), slices=3)
        lengths = column_squares(coordinates(W) for _, W in read(ROWS)).sqrt()
        shares = torch.where(lengths > _ZERO, 1 / lengths, 0.0)
        trained = ExactProduct(self._trained(device), V.T.contiguous(), slices=3)
        back = ExactRight(trained.rows(0, len(V)), slices=3)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            return back(coordinates(W) * shares)

        return rows

    def _trained(self, device: str) -> Tensor:
        """S + diag(l)."""
        import torch

        l, values = (read_tensor(ref, torch.float64, device) for ref in (self.l, self.values))  # noqa: E741
        size = read_tensor(self.size).tolist()
        if size != [len(l), len(l)]:
            raise FormatError("the size of the sparse part is not the basis's", found=size, expected=[len(l), len(l)])
        rows, columns = read_places(self.places, len(l), device=device)
        flat = rows * len(l) + columns
        if len(flat.unique()) != len(flat):
            raise FormatError("the sparse part names a place twice")
        found = torch.zeros(len(l) ** 2, dtype=torch.float64, device=device)
        found[flat] = values
        return found.reshape(len(l), len(l)) + torch.diag(l)
