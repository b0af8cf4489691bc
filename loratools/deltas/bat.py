"""Bat: a weight's square blocks each multiplied by a matrix of its row of blocks, W′ = W + W·M + M.

Kang and Yin 2024 (arXiv:2409.15371), section 3.2; peft 0.21.2 `tuners/miss/layer.py::get_delta_weight`, `init_weights="bat"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Bound, Delta, Read, require_floating
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Bat(Delta):
    """W′[p, q] = W[p, q] + W[p, q]·M[p] + M[p] for the (r, r) blocks of W, M (out/r, r, r). Raises ShapeError where W has not so many."""

    kind = "bat"

    M: Ref

    def spec(self, base: Spec | None) -> Spec:
        shape = self.M.spec.shape
        if len(shape) != 3 or shape[1] != shape[2] or not self.M.spec.numel:
            raise ShapeError("no square matrices side by side", found=list(shape), expected="[out/r, r, r]")
        count, size, _ = shape
        if base is None or len(base.shape) != 2 or base.shape[0] != count * size or base.shape[1] % size:
            found = None if base is None else list(base.shape)
            raise ShapeError("does not fit the base's weight", found=found, expected=f"[{count * size}, a multiple of {size}]")
        require_floating(base, self.M.spec)
        return base

    def facts(self) -> dict[str, Any]:
        return {"rank": self.M.spec.shape[-1]}

    @property
    def align(self) -> int | None:
        return self.M.spec.shape[1]

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        from loratools.linalg.exact import ExactRight

        assert base is not None
        M, slices = read_tensor(self.M, torch.float64, device), 3 if base.dtype == "F64" else 2
        size = M.shape[1]

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            own = M[part.start // size : part.stop // size]  # rows of blocks come whole
            change = ExactRight(own, slices=slices)(W.reshape(len(own), -1, size))
            return W.add_((change.reshape(len(own), size, -1, size) + own.unsqueeze(2)).reshape(W.shape).to(W.dtype))

        return rows
