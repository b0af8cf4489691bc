"""KaSA: W′ = W without its r smallest singular components + scaling·B·diag(d)·A, r the rank of A.

Wang et al. 2024 (arXiv:2412.06071), section 3; peft 0.21.2 `tuners/lora/variants.py::KasaLinearVariant`, which truncates the base
in float32 each time it loads the adapter. Here it is done in float64, and refused where float32 could have told the components
apart in another way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Bound, Delta, Read, exact_rows, require_floating
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class KaSA(Delta):
    """W′ = truncated(W) + scaling·B·diag(d)·A of a linear layer's W; A (r, in), B (out, r), d (r), r < min(out, in).

    It sees the whole weight, which is held in float64 beside its singular vectors. Raises ShapeError for parts that do not meet, and
    UnsupportedError when the weight's singular values on both sides of the cut are too close to each other.
    """

    kind = "kasa"

    A: Ref
    B: Ref
    d: Ref
    alpha: float
    rslora: bool = False

    def __post_init__(self) -> None:
        A, B, d = (ref.spec.shape for ref in (self.A, self.B, self.d))
        if len(A) != 2 or len(B) != 2 or A[0] != B[1] or d != A[:1] or not A[0]:
            found = f"A {list(A)}, B {list(B)}, d {list(d)}"
            raise ShapeError("the parts do not meet", found=found, expected="A [r, in], B [out, r], d [r]")

    @property
    def rank(self) -> int:
        return self.A.spec.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    def shape(self) -> tuple[int, ...]:
        return self.B.spec.shape[0], self.A.spec.shape[1]

    def spec(self, base: Spec | None) -> Spec:
        if base is None:
            raise ShapeError("changes a tensor that the base lacks", expected=f"a weight of shape {list(self.shape())}")
        if base.shape != self.shape():
            raise ShapeError("does not fit the base's weight", found=list(self.shape()), expected=list(base.shape))
        if self.rank >= min(base.shape):
            fact = "KaSA would take away all singular components of the weight"
            raise ShapeError(fact, found=f"rank {self.rank}", expected=f"below {min(base.shape)}")
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling}

    @property
    def align(self) -> int | None:
        return None

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        import torch

        assert base is not None
        A, B, d = (read_tensor(ref, torch.float64, device) for ref in (self.A, self.B, self.d))
        change = exact_rows(B * d, A, base, self.scaling)

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            return self._truncated(W).add_(change(part))

        return rows

    def _truncated(self, W: Tensor) -> Tensor:
        from loratools.linalg.parts import LIMIT, parts

        found, keep = parts(W), min(W.shape) - self.rank
        if found.doubt(keep) > LIMIT:
            raise UnsupportedError(
                "KaSA's truncation of this weight is not sure: peft did it in float32, which cannot tell its singular values apart there",
                found=f"{found.sigma[keep - 1]:.9g} and {found.sigma[keep]:.9g}",
                remedy="merge with peft, on the machine it was trained on",
            )  # fmt: skip
        return W - found.between(keep, len(found.sigma))
