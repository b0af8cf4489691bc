"""Adjoined: W′ = W + scale·(W·a1·a2 + b1·b2), a low-rank change that reads the weight beside one that does not: LyCORIS' GLoRA.

Chavan et al. 2023 (arXiv:2306.07967), section 3; lycoris-lora 4.1.3 `modules/glora.py`. peft's GLoRA multiplies elementwise instead
(`modulated`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Bound, Delta, Read, exact_rows, require_floating
from loratools.deltas.cored import cored
from loratools.deltas.turn import exactness
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Adjoined(Delta):
    """W′ = W + (alpha/r)·(W·a1·a2 + b1·b2), a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, *kernel).

    With a core bm (r, r, *kernel) b2 is (r, in) and b1·bm·b2 takes the place of b1·b2, as in `Tucker`. Of a convolution a1·a2 mixes the
    input channels at each place of the kernel. Raises ShapeError for factors that do not meet.
    """

    kind = "glora"

    a1: Ref
    a2: Ref
    b1: Ref
    b2: Ref
    alpha: float
    bm: Ref | None = None

    def __post_init__(self) -> None:
        a1, a2, b1, b2 = (ref.spec.shape for ref in (self.a1, self.a2, self.b1, self.b2))
        met = len(a1) == len(a2) == len(b1) == 2 and len(b2) > 1 and a1 == a2[::-1] and b1[1] == b2[0] and b2[1] == a1[0] and a1[1]
        core = None if self.bm is None else self.bm.spec.shape
        if core is not None:
            met = met and len(b2) == 2 and len(core) > 2 and core[:2] == (b1[1], b2[0])
        if not met:
            found = f"a1 {list(a1)}, a2 {list(a2)}, b1 {list(b1)}, b2 {list(b2)}"
            expected = "a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, in, *kernel]"
            if core is not None:
                found, expected = f"{found}, bm {list(core)}", "a1 [in, r], a2 [r, in], b1 [out, r], b2 [r, in], bm [r, r, *kernel]"
            raise ShapeError("the factors do not meet", found=found, expected=expected)

    @property
    def scaling(self) -> float:
        return self.alpha / self.a2.spec.shape[0]

    def spec(self, base: Spec | None) -> Spec:
        kernel = self.b2.spec.shape[2:] if self.bm is None else self.bm.spec.shape[2:]
        shape = (self.b1.spec.shape[0], self.b2.spec.shape[1], *kernel)
        ends = (1,) * max(0, 0 if base is None else len(base.shape) - len(shape))
        if base is None or (*shape, *ends) != base.shape:
            found = None if base is None else list(base.shape)
            raise ShapeError("does not fit the base's weight", found=list(shape), expected=found)
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def fitted(self, base: Spec) -> Self:
        if self.bm is not None:
            return self
        return replace(self, b2=self.b2.reshape(self.b2.spec.shape[0], *base.shape[1:]))

    def facts(self) -> dict[str, Any]:
        return {"rank": self.a2.spec.shape[0], "alpha": self.alpha, "scaling": self.scaling}

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        from loratools.linalg.exact import ExactRight

        assert base is not None
        a1, a2, b1, b2 = (read_tensor(ref, torch.float64, device) for ref in (self.a1, self.a2, self.b1, self.b2))
        into, out = (ExactRight(factor, slices=exactness(base)) for factor in (a1, a2))
        right = b2.flatten(1) if self.bm is None else cored(read_tensor(self.bm, torch.float64, device), b2)
        plus, scale, width = exact_rows(b1, right, base, self.scaling), self.scaling, len(a1)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            places = W.reshape(len(W), width, -1).transpose(1, 2)  # (rows, kernel, in)
            mixed = out(into(places.reshape(-1, width))).reshape(places.shape).transpose(1, 2).reshape(W.shape)
            return mixed.mul_(scale).add_(W).add_(plus(part))

        return rows
