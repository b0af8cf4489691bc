"""Modulated: each element of a weight times a number of its own, and another added: HiRA and GLoRA.

Huang et al. 2025 (HiRA, ICLR 2025): W + W∘(B·A); Chavan et al. 2023 (GLoRA, arXiv:2306.07967): W + W∘A + B, where peft 0.21.2
`tuners/glora/layer.py` multiplies elementwise. `tuners/hira/layer.py` has no scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Additive, Affine, Bound, Delta, Dense, Keep, Read, require_floating
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Spread(Additive):
    """W′ = W + value, a number for each row, value (out) or (out, 1), or a `single` one for all. Raises ShapeError for other values."""

    kind = "spread"
    reproducible = True

    value: Ref
    single: bool = False
    size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.value.spec.shape not in ((self.value.spec.numel,), (self.value.spec.numel, 1)):
            raise ShapeError("no number for each row", found=list(self.value.spec.shape), expected="[out, 1], [out] or [1]")

    def shape(self) -> tuple[int, ...]:
        return self.size or self.value.spec.shape

    def spec(self, base: Spec | None) -> Spec:
        expected = 1 if self.single else None if base is None else base.matrix[0]
        if base is None or self.value.spec.numel != expected:
            raise ShapeError("holds numbers for other rows than the weight has", found=self.value.spec.numel, expected=expected)
        require_floating(base, self.value.spec)
        return base

    def fitted(self, base: Spec) -> Self:
        return replace(self, size=base.shape)

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        import torch

        rows, columns = base.matrix
        value = (read_tensor(self.value, torch.float64, device) * scale).reshape(-1, 1).expand(rows, columns)
        return lambda part: value[part].clone()


@dataclass(frozen=True, eq=False, kw_only=True)
class Modulated(Delta):
    """W′ = W + W ∘ times + plus, both the differences of additive deltas of W's shape.

    Raises what these raise where they do not fit the weight.
    """

    kind = "modulated"

    times: Additive
    plus: Additive | None = None

    @property
    def parts(self) -> tuple[Additive, ...]:
        return (self.times,) if self.plus is None else (self.times, self.plus)

    def spec(self, base: Spec | None) -> Spec:
        for part in self.parts:
            part.spec(base)
        return self.times.spec(base)

    def fitted(self, base: Spec) -> Self:
        return self.each(lambda part: part.fitted(base))

    def each(self, change: Callable[[Additive], Additive]) -> Self:
        """The same of other differences."""
        return replace(self, times=change(self.times), plus=None if self.plus is None else change(self.plus))

    def facts(self) -> dict[str, Any]:
        return self.times.facts()

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        times = self.times.bind_dense(base, 1.0, device)
        plus = None if self.plus is None else self.plus.bind_dense(base, 1.0, device)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            W.mul_(times(part).add_(1))
            return W if plus is None else W.add_(plus(part))

        return rows

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        """W′ = a∘(W + d), a = 1 + s·times and d = s·plus/a; an a of 0 leaves nothing of the weight, which the corrections hold."""
        if not all(part.reproducible for part in self.parts):
            return None
        times = self.times.bind_dense(base, strength, device)
        plus = None if self.plus is None else self.plus.bind_dense(base, strength, device)

        def rows(part: slice) -> tuple[Tensor | None, Tensor]:
            a = times(part).add(1)
            return a, a.new_zeros(a.shape) if plus is None else plus(part) / a

        return rows

    def refs(self) -> dict[str, Ref]:
        pairs = (("times", self.times), ("plus", self.plus))
        return {f"{place}.{name}": ref for place, part in pairs if part is not None for name, ref in part.refs().items()}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return self.each(lambda part: part.map(fn))
