"""Sum: several differences of one weight as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Additive, Dense
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Sum(Additive):
    """W′ = W + ΔW₁ + ΔW₂ + …, added in this order. Raises what a part raises that does not fit."""

    parts: tuple[Additive, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ShapeError("a sum of nothing")

    @property
    def kind(self) -> str:  # type: ignore[override]
        return "+".join(part.kind for part in self.parts)

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return all(part.reproducible for part in self.parts)

    def shape(self) -> tuple[int, ...]:
        return next((shape for part in self.parts if (shape := part.shape())), ())

    def spec(self, base: Spec | None) -> Spec:
        first, *_ = [part.spec(base) for part in self.parts]
        return first

    def fitted(self, base: Spec) -> Self:
        return replace(self, parts=tuple(part.fitted(base) for part in self.parts))

    def facts(self) -> dict[str, Any]:
        return {name: value for part in self.parts for name, value in part.facts().items()}

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        bound = [part.bind_dense(base, scale, device) for part in self.parts]

        def rows(part: slice) -> Tensor:
            total = bound[0](part)
            for dense in bound[1:]:
                total = total + dense(part)
            return total

        return rows

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        import torch

        found = [part.product(device) for part in self.parts]
        known = [pair for pair in found if pair is not None]
        if len(known) < len(found):
            return None
        return torch.cat([B for B, _ in known], dim=1), torch.cat([A for _, A in known])

    def refs(self) -> dict[str, Ref]:
        return {f"{index}.{name}": ref for index, part in enumerate(self.parts) for name, ref in part.refs().items()}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, parts=tuple(part.map(fn) for part in self.parts))
