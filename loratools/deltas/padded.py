"""Padded: a weight that grows, with zeros, before it is changed: ComfyUI's `reshape_weight`.

A control LoRA feeds a layer more channels than the base's has: the base gets columns of zeros for them, and the change fills them.
Read from ComfyUI `comfy/weight_adapter/base.py` (`pad_tensor_to_shape`) and `lora.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Bound, Delta, Read
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Padded(Delta):
    """W′ = δ(W with zeros behind it along each axis, up to `size`); the padded weight is held once in float64.

    Raises ShapeError for a weight with other axes, or one that is larger along any of them.
    """

    kind = "padded"

    delta: Delta
    size: tuple[int, ...]

    def _grown(self, base: Spec) -> Spec:
        if len(base.shape) != len(self.size) or any(old > new for old, new in zip(base.shape, self.size, strict=True)):
            raise ShapeError("is to grow to a shape that does not hold it", found=list(base.shape), expected=f"within {list(self.size)}")
        return replace(base, shape=self.size)

    def spec(self, base: Spec | None) -> Spec:
        if base is None:
            raise ShapeError("changes a tensor that the base lacks", expected=f"a weight within {list(self.size)}")
        return self.delta.spec(self._grown(base))

    def fitted(self, base: Spec) -> Self:
        return replace(self, delta=self.delta.fitted(self._grown(base)))

    @property
    def align(self) -> int | None:
        return None

    def matrix(self, base: Spec) -> tuple[int, int]:
        return self.delta.matrix(replace(base, shape=self.size))

    def facts(self) -> dict[str, Any]:
        return self.delta.facts()

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        assert base is not None
        grown = self._grown(base)
        W = torch.zeros(self.size, dtype=torch.float64, device=device)
        blocks = [block.to(torch.float64, copy=True) for _, block in read(max(1, base.shape[0]))]
        W[tuple(slice(size) for size in base.shape)] = torch.cat(blocks).reshape(base.shape)
        padded = W.reshape(self.delta.matrix(grown))

        def read_padded(rows: int) -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, len(padded), rows):
                part = slice(start, min(start + rows, len(padded)))
                yield part, padded[part].clone()

        bound = self.delta.bind(grown, read_padded, device)
        return lambda part, _: bound(part, padded[part].clone())

    def refs(self) -> dict[str, Ref]:
        return self.delta.refs()

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, delta=self.delta.map(fn))
