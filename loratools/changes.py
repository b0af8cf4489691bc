"""What several deltas make of one weight, each apart: sᵢ·(applyᵢ(W) − W), a block of rows at a time, in float64.

An additive delta tells its difference without the weight, any other needs it. Nothing is held but the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from loratools.deltas.base import Additive, Delta, Read
from loratools.errors import UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensors import as_tensor

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 18  # elements of a block of rows
WRITTEN = "F32"  # how exact a delta must be: products to about 2⁻⁵⁰ of their factors' norms (`LowRank`)

Part = Callable[[slice], "Tensor"]


def reader(ref: Ref, columns: int, device: str = "cpu") -> Read:
    """A tensor's rows of so many columns in float64, for kinds that look at a weight before they change it."""
    import torch

    flat = ref.reshape(ref.spec.numel // max(1, columns), columns)

    def read(rows: int) -> Iterator[tuple[slice, Tensor]]:
        total = flat.spec.shape[0]
        for start in range(0, total, rows):
            part = slice(start, min(start + rows, total))
            narrow = as_tensor(bytearray(flat.rows(part.start, part.stop)), Spec(flat.spec.dtype, (part.stop - part.start, columns)))
            yield part, narrow.to(device=device, dtype=torch.float64)

    return read


class Changes:
    """The changes of one weight by `terms`, pairs of a delta and its strength; `weight` may be None where all are additive.

    `spec` is the weight's, `written` the dtype that decides how exact a delta must be; rows and columns are those of the matrix
    that all deltas see, a `block` is of about so many elements. Raises UnsupportedError for deltas that
    need a weight that is not there, or that make a tensor of another shape of it.

    >>> import torch
    >>> from loratools.deltas.full import Full
    >>> from loratools.tensors import to_ref
    >>> found = Changes([(Full(diff=to_ref(torch.ones(2, 2))), 0.5)], Spec("F32", (2, 2)), None)
    >>> [part.tolist() for rows in found.parts() for part in found(rows)]
    [[[0.5, 0.5], [0.5, 0.5]]]
    """

    def __init__(
        self, terms: Sequence[tuple[Delta, float]], spec: Spec, weight: Ref | None, *, block: int | None = None, written: str = WRITTEN,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.spec, self.block, self.device = Spec(written, spec.shape), block or BLOCK, device
        views = {delta.matrix(self.spec) for delta, _ in terms}
        self.rows, self.columns = min(views, key=lambda view: view[1])  # the finest rows, of which all views are multiples
        self.weight = None if weight is None else weight.reshape(self.rows, self.columns)
        aligned = [delta.align for delta, _ in terms]
        self.step = max(1, self.rows) if None in aligned else math.lcm(*(rows or 1 for rows in aligned))
        self.terms = [self._term(delta, strength) for delta, strength in terms]

    def parts(self) -> Iterator[slice]:
        """The rows of each block, in order."""
        step = max(1, self.block // max(1, self.columns) // self.step) * self.step
        for start in range(0, self.rows, step):
            yield slice(start, min(start + step, self.rows))

    def __call__(self, part: slice) -> list[Tensor]:
        """The block of every term, (rows, columns) in float64; valid until the next call."""
        return [term(part) for term in self.terms]

    def one(self, index: int) -> Iterator[Tensor]:
        """All blocks of one term."""
        return (self.terms[index](part) for part in self.parts())

    def base(self, part: slice) -> Tensor:
        """The block of W itself, in float64."""
        import torch

        assert self.weight is not None
        spec = Spec(self.weight.spec.dtype, (part.stop - part.start, self.columns))
        return as_tensor(bytearray(self.weight.rows(part.start, part.stop)), spec).to(device=self.device, dtype=torch.float64)

    def _term(self, delta: Delta, strength: float) -> Part:
        if isinstance(delta, Additive):
            return delta.bind_dense(self.spec, strength, self.device)
        if self.weight is None:
            raise UnsupportedError(f"what {delta.called} delta changes depends on the base", remedy="give --base")
        made = delta.spec(self.spec).shape
        if made != self.spec.shape:
            raise UnsupportedError("makes a tensor of another shape", found=list(made), expected=list(self.spec.shape))
        bound = delta.bind(self.spec, reader(self.weight, self.columns, self.device), self.device)

        def term(part: slice) -> Tensor:
            W = self.base(part)
            return bound(part, W.clone()).sub(W).mul_(strength)

        return term
