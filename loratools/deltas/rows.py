"""Rows: single rows of a table put in the place of the base's own, as trained tokens are those of an embedding.

peft 0.21.2 `tuners/trainable_tokens/layer.py`: `W.index_copy(0, indices, values)`.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.base import Affine, Bound, Delta, Keep, Read, require_floating
from loratools.errors import FormatError, ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows(Delta):
    """W′[indices] = values, in the order of the indices; all other rows are W's.

    values (n, columns) of any floating dtype, n indices from 0 up. Raises ShapeError where they do not meet or the weight has too
    few rows, FormatError for a row that stands twice with different values.
    """

    kind = "rows"
    follows_tie = True

    values: Ref
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = self.values.spec.shape
        if len(shape) != 2 or shape[0] != len(self.indices):
            raise ShapeError("not a row for each index", found=list(shape), expected=f"[{len(self.indices)}, columns]")
        first: dict[int, int] = {}
        for place, index in enumerate(self.indices):
            before = first.setdefault(index, place)
            if before != place and bytes(self.values.rows(before, before + 1)) != bytes(self.values.rows(place, place + 1)):
                raise FormatError("a row stands twice, with different values", found=f"index {index}")

    def spec(self, base: Spec | None) -> Spec:
        columns = self.values.spec.shape[1]
        if base is None or len(base.shape) != 2 or base.shape[1] != columns:
            raise ShapeError("rows of another length", found=columns, expected=None if base is None else list(base.shape))
        if (last := max(self.indices, default=0)) >= base.shape[0]:
            remedy = "the vocabulary was larger in training: save the adapter with save_embedding_layers=True"
            raise ShapeError("a row that the weight does not have", found=last, expected=f"below {base.shape[0]}", remedy=remedy)
        require_floating(base, self.values.spec)
        return base

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        order = sorted(range(len(self.indices)), key=self.indices.__getitem__)
        places = [self.indices[place] for place in order]
        values = read_tensor(self.values, torch.float64, device)[order]

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            low, high = bisect_left(places, part.start), bisect_left(places, part.stop)
            if low < high:
                W[[place - part.start for place in places[low:high]]] = values[low:high].to(W.dtype)
            return W

        return rows

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        """W′ = W but for these rows, of which nothing tells W: the corrections hold them."""
        import torch

        columns = base.shape[1]
        return lambda part: (None, torch.zeros(part.stop - part.start, columns, dtype=torch.float64, device=device))
