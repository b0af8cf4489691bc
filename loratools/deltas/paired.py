"""Paired: each row of a weight mixed with one other, a rotation and a scaling in two dimensions: RoAd.

Liao and Monz 2024 (arXiv:2409.00119), equation 4; peft 0.21.2 `tuners/road/layer.py` (`_prepare_cols`, `_apply_road`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Bound, Delta, Read, require_floating
from loratools.errors import OptionError, ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Paired(Delta):
    """W′ = c ∘ W + s ∘ W°, c = α·cos θ and s = α·sin θ for each row; W° is W with the halves of each group exchanged, its first negative.

    theta and alpha hold, group by group, `variant` 1: a number for each pair, 2: for each row, 4: one of c for each row, then one of s.
    Raises ShapeError for numbers that make no whole groups of an even number of rows, or another weight's.
    """

    kind = "road"

    theta: Ref
    alpha: Ref
    variant: int
    group: int

    def __post_init__(self) -> None:
        if self.variant not in (1, 2, 4):
            raise OptionError("variant", found=self.variant, expected="1, 2 or 4")
        shape, other = self.theta.spec.shape, self.alpha.spec.shape
        even = self.group > 0 and self.group % 2 == 0
        if len(shape) != 1 or shape != other or not even or shape[0] * 2 % (self.group * self.variant):
            expected = f"two vectors for groups of an even number of rows ({self.group})"
            raise ShapeError("angles and scales do not meet", found=f"{list(shape)}, {list(other)}", expected=expected)

    @property
    def count(self) -> int:
        """The rows that the numbers are for."""
        return self.theta.spec.numel * 2 // self.variant

    @property
    def align(self) -> int | None:
        return self.group

    def spec(self, base: Spec | None) -> Spec:
        if base is None or base.matrix[0] != self.count:
            raise ShapeError("pairs other rows than the weight has", found=self.count, expected=None if base is None else base.matrix[0])
        require_floating(base, self.theta.spec, self.alpha.spec)
        return base

    def facts(self) -> dict[str, Any]:
        return {"block": 2}

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        half = self.group // 2
        c, s = (X.to(device).reshape(-1, 2, half, 1) for X in self.factors())

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            groups, at = W.view(-1, 2, half, W.shape[1]), slice(part.start // self.group, part.stop // self.group)
            other = groups.flip(1)
            other[:, 0].neg_()
            groups.mul_(c[at]).add_(other.mul_(s[at]))
            return W

        return rows

    def factors(self) -> tuple[Tensor, Tensor]:
        """(c, s), one of each for each row, in float64."""
        import torch

        theta, alpha = (read_tensor(ref, torch.float64) for ref in (self.theta, self.alpha))
        if self.variant == 4:
            angles, scales = (X.view(-1, 2, self.group) for X in (theta, alpha))
            return (scales[:, 0] * angles[:, 0].cos()).flatten(), (scales[:, 1] * angles[:, 1].sin()).flatten()
        if self.variant == 1:
            theta, alpha = (X.view(-1, 1, self.group // 2).expand(-1, 2, -1).flatten() for X in (theta, alpha))
        return alpha * theta.cos(), alpha * theta.sin()
