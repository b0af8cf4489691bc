"""A delta around another: it has that one's kind, facts, tensors and banks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Delta
from loratools.refs import Ref

if TYPE_CHECKING:
    from loratools.deltas.seeded import Bank


@dataclass(frozen=True, eq=False, kw_only=True)
class Around(Delta):
    """What says of another delta, `delta`, where or under which condition it is; a subclass tells how."""

    delta: Delta

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.delta.kind

    @property
    def draws(self) -> tuple[Bank, tuple[int, ...]] | None:
        return self.delta.draws

    def drawn(self, bank: Bank) -> Self:
        return replace(self, delta=self.delta.drawn(bank))

    def facts(self) -> dict[str, Any]:
        return self.delta.facts()

    def refs(self) -> dict[str, Ref]:
        return self.delta.refs()

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, delta=self.delta.map(fn))
