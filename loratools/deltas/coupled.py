"""Coupled: a bias that changes by what its module's weight is: GLoRA.

Chavan et al. 2023 (arXiv:2306.07967), equation 5; peft 0.21.2 `tuners/glora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Bound, Delta, Read, require_floating
from loratools.deltas.modulated import Modulated
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import as_tensor, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 18  # elements of the weight that are in memory at once


@dataclass(frozen=True, eq=False, kw_only=True)
class Coupled(Delta):
    """b′ = own(b) + W·c for the weight W (out, in) beside it, c = left·right of left (in, r) and right (r, 1); without right r is 1.

    Raises ShapeError where the parts do not meet, or do not fit the bias and the weight.
    """

    kind = "coupled"

    own: Modulated
    left: Ref
    right: Ref | None = None
    weight: Ref | None = None

    def __post_init__(self) -> None:
        left, right = self.left.spec.shape, (1, 1) if self.right is None else self.right.spec.shape
        if len(left) != 2 or right != (left[1], 1):
            raise ShapeError("the factors do not meet", found=f"{list(left)}, {list(right)}", expected="[in, r], [r, 1]")

    def spec(self, base: Spec | None) -> Spec:
        found = self.own.spec(base)
        require_floating(*(ref.spec for ref in self.refs().values()))
        return found

    def fitted(self, base: Spec) -> Self:
        return replace(self, own=self.own.fitted(base))

    def facts(self) -> dict[str, Any]:
        return self.own.facts()

    @property
    def beside(self) -> tuple[str, ...]:
        return ("weight",)

    def supplied(self, others: Mapping[str, Ref]) -> Self:
        weight = others["weight"]
        if len(weight.spec.shape) != 2 or weight.spec.shape[1] != self.left.spec.shape[0]:
            raise ShapeError("does not fit the weight", found=list(self.left.spec.shape), expected=f"[in, r] for {list(weight.spec.shape)}")
        require_floating(weight.spec)
        return replace(self, weight=weight)

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        from loratools.linalg.exact import ExactRight

        assert base is not None and self.weight is not None
        if self.weight.spec.shape[0] != base.numel:
            raise ShapeError("the weight has other rows than the bias", found=list(self.weight.spec.shape), expected=base.numel)
        own = self.own.bind(base, read, device)
        times = ExactRight(self._column(device), slices=3 if base.dtype == "F64" else 2)

        def rows(part: slice, b: Tensor | None) -> Tensor:
            result = own(part, b)
            for at, W in self._weight(part, device):
                result[at.start - part.start : at.stop - part.start] += times(W)
            return result

        return rows

    def _column(self, device: str) -> Tensor:
        """c, (in, 1) in float64."""
        import torch

        from loratools.linalg.exact import ExactProduct

        left = read_tensor(self.left, torch.float64)
        right = torch.ones(1, 1) if self.right is None else read_tensor(self.right, torch.float64)
        return ExactProduct(left, right, slices=3).rows(0, len(left)).to(device)

    def _weight(self, part: slice, device: str) -> Iterator[tuple[slice, Tensor]]:
        """The weight's rows of a part, some at a time, in float64."""
        import torch

        assert self.weight is not None
        columns = self.weight.spec.shape[1]
        step = max(1, _BLOCK // max(1, columns))
        for start in range(part.start, part.stop, step):
            at = slice(start, min(start + step, part.stop))
            spec = Spec(self.weight.spec.dtype, (at.stop - at.start, columns))
            yield at, as_tensor(bytearray(self.weight.rows(at.start, at.stop)), spec).to(device=device, dtype=torch.float64)

    def refs(self) -> dict[str, Ref]:
        own = {"left": self.left} | ({} if self.right is None else {"right": self.right})
        return self.own.refs() | own

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        right = None if self.right is None else fn(self.right)
        return replace(self, own=self.own.map(fn), left=fn(self.left), right=right)
