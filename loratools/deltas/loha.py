"""LoHa: ΔW = scale · (w1_a·w1_b) ∘ (w2_a·w2_b), a Hadamard product of two low-rank matrices.

Hyeon-Woo et al. 2022 (FedPara, arXiv:2108.06098), section 2.1; peft 0.21.2 `tuners/loha/layer.py`, lycoris `modules/loha.py`. Where a
convolution's kernel has a core t of its own (Tucker), a factor is Σᵢⱼ t[i, j, …]·w_a[i, out]·w_b[j, in].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Additive, Dense, exact_rows
from loratools.deltas.cored import cored
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class LoHa(Additive):
    """W′ = W + scale·(w1_a·w1_b) ∘ (w2_a·w2_b), seen as (out, in·kernel).

    w_a (out, r) and w_b (r, in·kernel); with cores t (r, r, *kernel) they are w_a (r, out) and w_b (r, in). Raises ShapeError when
    they do not meet.
    """

    kind = "loha"
    reproducible = True
    factored = True
    flat = True

    w1_a: Ref
    w1_b: Ref
    w2_a: Ref
    w2_b: Ref
    scale: float
    alpha: float | None = None
    t1: Ref | None = None
    t2: Ref | None = None

    def __post_init__(self) -> None:
        one, other = _sides(self.w1_a, self.w1_b, self.t1), _sides(self.w2_a, self.w2_b, self.t2)
        if one != other:
            raise ShapeError("the two factors have different shapes", found=list(other), expected=list(one))

    def shape(self) -> tuple[int, ...]:
        return _sides(self.w1_a, self.w1_b, self.t1)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.t1.spec.shape[2:] if self.t1 is not None else ()

    def facts(self) -> dict[str, Any]:
        return {"rank": self.w1_b.spec.shape[0], "alpha": self.alpha, "scaling": self.scale}

    def factors(self, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
        """Both factors as pairs of (out, r) and (r, in·kernel), in float64."""
        return [_pair(*refs, device) for refs in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2))]

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        (left, right), (left2, right2) = self.factors(device)
        one, other = exact_rows(left, right, base, self.scale * scale), exact_rows(left2, right2, base)
        return lambda part: one(part).mul_(other(part))

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        """Of rank r₁·r₂: each row of B the products of a row of both lefts, each column of A those of both rights (Khatri–Rao)."""
        (left, right), (left2, right2) = self.factors(device)
        B = (left.unsqueeze(2) * left2.unsqueeze(1)).flatten(1) * self.scale
        return B, (right.unsqueeze(1) * right2.unsqueeze(0)).flatten(0, 1)


def _sides(a: Ref, b: Ref, t: Ref | None) -> tuple[int, int]:
    """(out, in·kernel) of a factor."""
    left, right, core = a.spec.shape, b.spec.shape, None if t is None else t.spec.shape
    met = len(left) == len(right) == 2 and (left[1] == right[0] if core is None else core[:2] == (left[0], right[0]))
    if not met:
        found = f"w_a {list(left)}, w_b {list(right)}" + ("" if core is None else f", t {list(core)}")
        expected = "w_a [out, r], w_b [r, in·kernel]" if core is None else "w_a [r, out], w_b [r, in], t [r, r, *kernel]"
        raise ShapeError("the factors do not meet", found=found, expected=expected)
    if core is None:
        return left[0], right[1]
    import math

    return left[1], right[1] * math.prod(core[2:])


def _pair(a: Ref, b: Ref, t: Ref | None, device: str) -> tuple[Tensor, Tensor]:
    import torch

    left, right = (read_tensor(ref, torch.float64, device) for ref in (a, b))
    return (left, right) if t is None else (left.T.contiguous(), cored(read_tensor(t, torch.float64, device), right))
