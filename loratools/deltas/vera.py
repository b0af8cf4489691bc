"""VeRA: ΔW = (b ∘ B)·(d ∘ A), frozen random matrices that all layers share, and two vectors that are trained.

Kopiczko et al. 2024 (arXiv:2310.11454), section 3.1; peft 0.21.2 `tuners/vera/layer.py`, which lets layers of different sizes use
the first rows of B and the first columns of A, and `tuners/pvera/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from loratools.deltas.base import Product, require_floating
from loratools.deltas.seeded import Bank
from loratools.errors import ShapeError
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class VeRA(Product):
    """W′ = W + (b ∘ B[:out])·(d ∘ A[:, :in]), b (out), d (r), A (r, widest in), B (most out, r).

    A `bank` stands for A and B where the file lacks them. `width` is the weight's own in, filled in once a base is met. Raises
    ShapeError when the parts do not meet.
    """

    kind = "vera"
    parts: ClassVar[int] = 1

    b: Ref
    d: Ref
    A: Ref | None = None
    B: Ref | None = None
    bank: Bank | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        b, d = self.b.spec.shape, self.d.spec.shape
        A, B = (None if ref is None else ref.spec.shape for ref in (self.A, self.B))
        known = A is None or B is None or ([len(A), len(B)] == [2, 2] and A[0] == self.parts * B[1] and b[0] <= B[0])
        if [len(b), len(d)] != [1, 1] or d[0] % self.parts or not known or (A is not None and A[0] != d[0]):
            rows = f"{self.parts}·r" if self.parts > 1 else "r"
            found = [f"{name} {list(shape)}" for name, shape in (("A", A), ("B", B), ("b", b), ("d", d)) if shape is not None]
            expected = f"A [{rows}, in], B [out, r], b [out], d [{rows}]"
            raise ShapeError("the projections and vectors do not meet", found=", ".join(found), expected=expected)

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return self.bank is None

    @property
    def rank(self) -> int:
        return self.d.spec.numel // self.parts

    @property
    def draws(self) -> tuple[Bank, tuple[int, ...]] | None:
        return None if self.bank is None else (self.bank, self.shape())

    def drawn(self, bank: Bank) -> Self:
        return replace(self, bank=bank)

    def shape(self) -> tuple[int, ...]:
        """(out, in); without a base the in is A's, or not known."""
        width = self.width or (None if self.A is None else self.A.spec.shape[1])
        return (self.b.spec.numel,) if width is None else (self.b.spec.numel, width)

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def spec(self, base: Spec | None) -> Spec:
        if base is None or self.width is not None:
            return super().spec(base)
        (out, *most), found = self.shape(), base.shape
        if len(found) != 2 or found[0] != out or (most and found[1] > most[0]):
            expected = f"[{out}, at most {most[0]}]" if most else f"[{out}, in]"
            raise ShapeError("does not fit the base's weight", found=list(found), expected=expected)
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def fitted(self, base: Spec) -> Self:
        return replace(self, width=base.shape[1])

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        b, d = (read_tensor(ref, torch.float64, device).reshape(-1, 1) for ref in (self.b, self.d))
        A, B = self._projections(device)
        out, width = (*self.shape(), A.shape[1])[:2]
        return b * B[:out], d[: self.rank] * A[: self.rank, :width]

    def _projections(self, device: str) -> tuple[Tensor, Tensor]:
        import torch

        if self.bank is not None:
            A, B = self.bank.tensors
            return A.to(device, torch.float64), B.to(device, torch.float64)
        assert self.A is not None and self.B is not None
        return read_tensor(self.A, torch.float64, device), read_tensor(self.B, torch.float64, device)


@dataclass(frozen=True, eq=False, kw_only=True)
class PVeRA(VeRA):
    """PVeRA: d (2r) and A (2r, in) give a mean and the logarithm of a variance of it; a weight has the mean, their first halves.

    peft 0.21.2 adds the noise while it trains, and with `sample_at_inference`.
    """

    kind = "pvera"
    parts = 2
