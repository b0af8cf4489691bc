"""Scaled: each row or column of a weight times a number of its own, as (IA)³ learns them.

Liu et al. 2022 (arXiv:2205.05638), section 3.3; peft 0.21.2 `tuners/ia3/layer.py` multiplies by l, lycoris `modules/ia3.py` by 1 + l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.deltas.base import Affine, Bound, Delta, Keep, Read, require_floating
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaled(Delta):
    """W′ = (offset + l) ∘ W, l (out) over the first axis or (in) over the second, which is an axis of its own before any kernel.

    Raises ShapeError for a weight that has not as many rows, or columns.
    """

    kind = "ia3"

    l: Ref  # noqa: E741
    axis: int = 0
    offset: float = 0.0

    def spec(self, base: Spec | None) -> Spec:
        count = self.l.spec.numel
        if base is None or len(base.shape) <= self.axis or base.shape[self.axis] != count:
            what = "columns" if self.axis else "rows"
            raise ShapeError(f"scales other {what} than the weight has", found=count, expected=None if base is None else list(base.shape))
        require_floating(base, self.l.spec)
        return base

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        factors = self._factors(base, device)
        return lambda part, W: _there(W).mul_(factors[part] if self.axis == 0 else factors)

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        """W′ = a∘W; a factor of 0 leaves nothing of the weight to tell it by, which the corrections hold."""
        import torch

        a = 1 + strength * (self._factors(base, device) - 1)
        columns = self.matrix(base)[1]

        def rows(part: slice) -> tuple[Tensor | None, Tensor]:
            none = torch.zeros(part.stop - part.start, columns, dtype=torch.float64, device=device)
            return (a[part] if self.axis == 0 else a), none

        return rows

    def _factors(self, base: Spec, device: str) -> Tensor:
        """(rows, 1) or (1, columns) in float64; an input channel's number stands for all of its kernel."""
        import torch

        factors = self.offset + read_tensor(self.l, torch.float64, device).reshape(-1)
        if self.axis == 0:
            return factors.unsqueeze(1)
        return factors.repeat_interleave(base.matrix[1] // factors.numel()).unsqueeze(0)


def _there(W: Tensor | None) -> Tensor:
    assert W is not None
    return W
