"""Sized: a difference whose shape its own tensors do not tell, so that the weight it meets has to."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from loratools.deltas.base import Additive, require_floating
from loratools.errors import ShapeError
from loratools.refs import Spec


@dataclass(frozen=True, eq=False, kw_only=True)
class Sized(Additive):
    """A ΔW for matrices only; `size` is the weight's (out, in), filled in once a base is met."""

    size: tuple[int, int] | None = None

    def shape(self) -> tuple[int, ...]:
        return self.size or ()

    @abstractmethod
    def check(self, out: int, width: int) -> None:
        """Raise ShapeError where it is no change of an (out, width) weight."""

    def spec(self, base: Spec | None) -> Spec:
        if base is None or self.size is not None:
            return super().spec(base)
        if len(base.shape) != 2:
            raise ShapeError("a change of matrices only", found=list(base.shape))
        self.check(*base.shape)
        require_floating(base, *(ref.spec for name, ref in self.refs().items() if name not in self.indices))
        return base

    def fitted(self, base: Spec) -> Self:
        rows, columns = base.shape
        return replace(self, size=(rows, columns))
