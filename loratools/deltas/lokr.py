"""LoKr: ΔW = scale · w1 ⊗ w2, a Kronecker product of two small matrices, each whole or low-rank.

Edalati et al. 2022 (KronA, arXiv:2212.10650), Yeh et al. 2023 (arXiv:2309.14859), section 3; peft 0.21.2 `tuners/lokr/layer.py`. w2
carries a convolution's kernel, with a core t2 of its own (Tucker) as Σᵢⱼ t2[i, j, …]·w2_a[i, b]·w2_b[j, d].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Additive, Dense
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class LoKr(Additive):
    """W′[a·out₂ + b, c·in₂ + d, …] = W[…] + scale·w1[a, c]·w2[b, d, …], seen as (out, in·kernel).

    w1 (out₁, in₁) or w1_a (out₁, r)·w1_b (r, in₁); w2 (out₂, in₂, *kernel) or w2_a (out₂, r)·w2_b (r, in₂·kernel), or with
    t2 (r, r, *kernel) w2_a (r, out₂) and w2_b (r, in₂). With `exchanged`, for a whole w2, w2's indices go before w1's:
    W′[b·out₁ + a, d·in₁ + c, …]. Raises ShapeError for factors that do not meet.
    """

    kind = "lokr"
    reproducible = True
    factored = True
    flat = True

    w1: Ref | None = None
    w1_a: Ref | None = None
    w1_b: Ref | None = None
    w2: Ref | None = None
    w2_a: Ref | None = None
    w2_b: Ref | None = None
    t2: Ref | None = None
    scale: float
    alpha: float | None = None
    exchanged: bool = False

    def __post_init__(self) -> None:
        _check("w1", self.w1, self.w1_a, self.w1_b, None)
        _check("w2", self.w2, self.w2_a, self.w2_b, self.t2)
        if self.exchanged and (self.w2 is None or len(self.w2.spec.shape) < 3):
            raise ShapeError("only a whole w2 with a kernel has its indices exchanged with w1's")

    def sides(self) -> tuple[tuple[int, int], tuple[int, int, int]]:
        """(out₁, in₁) and (out₂, in₂, kernel); where nothing tells the kernel it is within in₂."""
        one = self.w1.spec.shape if self.w1 else (_of(self.w1_a).shape[0], _of(self.w1_b).shape[1])
        if self.w2:
            out, width, *kernel = self.w2.spec.shape
            return (one[0], one[1]), (out, width, math.prod(kernel))
        a, b = _of(self.w2_a).shape, _of(self.w2_b).shape
        return (one[0], one[1]), ((a[1], b[1], math.prod(self.t2.spec.shape[2:])) if self.t2 else (a[0], b[1], 1))

    def shape(self) -> tuple[int, ...]:
        (out, width), (out2, width2, kernel) = self.sides()
        return out * out2, width * width2 * kernel

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return next((ref.spec.shape[2:] for ref in (self.w2, self.t2) if ref is not None), ())

    @property
    def rank(self) -> int | None:
        """That of a low-rank factor, where there is one."""
        ref = self.w1_b or self.w2_b
        return ref.spec.shape[0] if ref else None

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "scaling": self.scale}

    def factors(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """w1 (out₁, in₁) and w2 (out₂, in₂·kernel) in float64."""
        from loratools.linalg.blocks import multiplied

        one, other = self._pairs(device)
        return multiplied(*one) if len(one) == 2 else one[0], multiplied(*other) if len(other) == 2 else other[0]

    def _pairs(self, device: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Each factor as the one matrix or the two that its file has."""
        import torch

        from loratools.deltas.cored import cored

        def read(*refs: Ref | None) -> tuple[Tensor, ...]:
            return tuple(read_tensor(ref, torch.float64, device) for ref in refs if ref is not None)

        one, other = read(self.w1) or read(self.w1_a, self.w1_b), read(self.w2) or read(self.w2_a, self.w2_b)
        if self.t2 is not None:
            other = other[0].T.contiguous(), cored(read_tensor(self.t2, torch.float64, device), other[1])
        return one, tuple(factor.flatten(1) for factor in other)

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        import torch

        (out, width), (out2, width2, kernel) = self.sides()
        w1, w2 = self.factors(device)
        w1 = w1 * (self.scale * scale)

        def rows(part: slice) -> Tensor:
            o = torch.arange(part.start, part.stop, device=device)
            if self.exchanged:
                left, right = w1[o % out].reshape(-1, 1, width, 1), w2[o // out].reshape(-1, width2, 1, kernel)
            else:
                left, right = w1[o // out2].reshape(-1, width, 1), w2[o % out2].reshape(-1, 1, width2 * kernel)
            return (left * right).flatten(1)

        return rows

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        """Of rank r₁·r₂, a whole factor counting as a product with the identity: (B₁ ⊗ B₂)·(A₁ ⊗ A₂)."""
        import torch

        _, (_, width2, kernel) = self.sides()
        (B1, A1), (B2, A2) = (_split(factors) for factors in self._pairs(device))
        rank = A1.shape[0] * A2.shape[0]
        if rank >= min(self.shape()):
            return None
        A2 = A2.reshape(-1, width2, kernel)
        left, right = ("pi,qj->qpij", "ic,jdk->ijdck") if self.exchanged else ("pi,qj->pqij", "ic,jdk->ijcdk")
        B = torch.einsum(left, B1 * self.scale, B2).reshape(-1, rank)
        return B, torch.einsum(right, A1, A2).reshape(rank, -1)

    def norm(self) -> float:
        import torch

        w1, w2 = self.factors()
        return abs(self.scale) * float(torch.linalg.vector_norm(w1) * torch.linalg.vector_norm(w2))


def _of(ref: Ref | None) -> Spec:
    assert ref is not None
    return ref.spec


def _check(name: str, whole: Ref | None, a: Ref | None, b: Ref | None, t: Ref | None) -> None:
    """A factor is whole, or a product of two, with a core between them or not."""
    if whole is not None and a is None and b is None and t is None:
        if len(whole.spec.shape) < 2 or (name == "w1" and len(whole.spec.shape) != 2):
            raise ShapeError(f"{name} is no factor of a weight", found=list(whole.spec.shape), expected="a matrix")
        return
    if whole is not None or a is None or b is None:
        raise ShapeError(f"{name} is neither whole nor a product of two")
    left, right, core = a.spec.shape, b.spec.shape, None if t is None else t.spec.shape
    met = left[1:] == right[:1] if core is None else len(core) > 2 and core[:2] == (left[0], right[0])
    if len(left) != 2 or len(right) != 2 or not right[0] or not met:
        found = f"{name}_a {list(left)}, {name}_b {list(right)}" + ("" if core is None else f", t2 {list(core)}")
        expected = "[out, r] and [r, in·kernel]" if core is None else "[r, out], [r, in] and [r, r, *kernel]"
        raise ShapeError("the factors do not meet", found=found, expected=expected)


def _split(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """A factor as a product: itself with the identity on its short side where it is whole."""
    import torch

    if len(factors) == 2:
        return factors[0], factors[1]
    (whole,) = factors
    rows, columns = whole.shape
    eye = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
    return (whole, eye) if columns <= rows else (eye, whole)
