"""FlatDoRA: a DoRA whose file gives its magnitudes as a bare vector, without saying whether they are of rows or of columns.

For formats that have no rule of their own (peft has one). The weight's shape tells the axis; of a square, the norms that the
magnitudes fit tell it, and where they fit both it is an error with the numbers of both readings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

from loratools.deltas.base import Additive, Bound, Delta, Read, require_floating
from loratools.deltas.dora import DoRA
from loratools.deltas.magnitudes import axis_of, norms
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class FlatDoRA(Delta):
    """W′ = m ∘ (W + ΔW) / ‖W + ΔW‖ along the axis that has as many norms as m (n) has numbers."""

    kind = "dora"

    direction: Additive
    magnitude: Ref

    def spec(self, base: Spec | None) -> Spec:
        found = self.direction.spec(base)
        require_floating(self.magnitude.spec)
        shape, sizes = self.magnitude.spec.shape, self._sizes(found)
        if len(shape) != 1 or shape[0] not in sizes.values():
            expected = " or ".join(f"[{size}]" for size in dict.fromkeys(sizes.values()))
            raise ShapeError("the magnitudes fit no axis of the weight", found=list(shape), expected=expected)
        return found

    def _sizes(self, base: Spec) -> dict[str, int]:
        """How many norms each axis has."""
        rows, columns = base.matrix
        return {"out": rows, "in": columns} if len(base.shape) == 2 else {"out": rows}

    def decided(self, base: Spec, read: Read, device: str = "cpu") -> DoRA:
        """The DoRA that is meant. Raises AmbiguousError where neither the shape nor the norms of W and W + ΔW tell."""
        import torch

        axes = [axis for axis, size in self._sizes(base).items() if size == self.magnitude.spec.numel]
        axis = axes[0]
        if len(axes) > 1 and self.magnitude.spec.numel > 1:  # of a single number both readings are one
            axis = axis_of(read_tensor(self.magnitude, torch.float64, device), norms(base, read, self.direction, device))
        count, ones = self.magnitude.spec.numel, (1,) * (len(base.shape) - 1)
        return DoRA(direction=self.direction, magnitude=self.magnitude.reshape(*((count, *ones) if axis == "out" else (1, count))))

    def matrix(self, base: Spec) -> tuple[int, int]:
        return self.direction.matrix(base)

    def facts(self) -> dict[str, Any]:
        return self.direction.facts()

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        return self.decided(base, read, device).bind(base, read, device)

    def refs(self) -> dict[str, Ref]:
        return {**self.direction.refs(), "magnitude": self.magnitude}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, direction=self.direction.map(fn), magnitude=fn(self.magnitude))
