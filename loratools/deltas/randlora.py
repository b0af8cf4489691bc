"""RandLoRA: ΔW = scale · Σᵢ Bᵢ·Λᵢ·A·Γᵢ, random bases that all layers share, and diagonals that are trained.

Albert et al. 2025 (arXiv:2502.00987), section 4; peft 0.21.2 `tuners/randlora/layer.py`. There the bases lie side by side, and the sum
is one product: B (long, n·r) numbers its inner axis (base, rank), Λ·A·Γ (r·n, short) numbers it (rank, base). That is what peft
trains and runs, so it is what a weight has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Additive, Dense, exact_rows, require_floating
from loratools.deltas.seeded import Bank
from loratools.errors import FormatError, ShapeError
from loratools.refs import Ref, Spec, same_bytes
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RandLoRA(Additive):
    """W′ = W + scale·B·(Λ∘A∘Γ), or its transpose where in > out: lambdas (r, n), gamma (n, short), A (r, 1, most), B (most, most n, r).

    short and long are the smaller and the larger of in and out, n = ⌈short / r⌉. The sum has full rank: no product is smaller than ΔW.
    A `bank` stands for A and B where the file lacks them; copies of them in a module must be equal. Raises ShapeError when the parts
    do not meet.
    """

    kind = "randlora"

    lambdas: Ref
    gamma: Ref
    scale: float
    alpha: float | None = None
    A: Ref | None = None
    B: Ref | None = None
    bank: Bank | None = None
    copy_a: Ref | None = None
    copy_b: Ref | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        lambdas, gamma = self.lambdas.spec.shape, self.gamma.spec.shape
        good = len(lambdas) == len(gamma) == 2 and lambdas[1] == gamma[0] == -(-gamma[1] // max(1, lambdas[0]))
        found = f"lambda {list(lambdas)}, gamma {list(gamma)}"
        if good and self.A is not None and self.B is not None:
            A, B = self.A.spec.shape, self.B.spec.shape
            good = len(A) == len(B) == 3 and A[:2] == (lambdas[0], 1) and B[2] == A[0] and A[2] >= gamma[1] and B[1] >= gamma[0]
            found = f"A {list(A)}, B {list(B)}, {found}"
        if not good:
            expected = "A [r, 1, short], B [long, n, r], lambda [r, n], gamma [n, short], n = short / r rounded up"
            raise ShapeError("the bases and their diagonals do not meet", found=found, expected=expected)
        for copy, whole in ((self.copy_a, self.A), (self.copy_b, self.B)):
            if copy is not None and (whole is None or copy.spec != whole.spec):
                raise ShapeError("a module's copy of a shared basis is another", found=copy.spec, expected=whole and whole.spec)

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        return self.bank is None

    @property
    def draws(self) -> tuple[Bank, tuple[int, ...]] | None:
        return None if self.bank is None else (self.bank, self.shape())

    def drawn(self, bank: Bank) -> Self:
        return replace(self, bank=bank)

    def shape(self) -> tuple[int, ...]:
        """(out, in); without a base only the smaller is known, and it is all there is."""
        return self.size or (self.gamma.spec.shape[1],)

    def facts(self) -> dict[str, Any]:
        return {"rank": self.lambdas.spec.shape[0], "alpha": self.alpha, "scaling": self.scale}

    def spec(self, base: Spec | None) -> Spec:
        if base is None or self.size is not None:
            return super().spec(base)
        short, most = self.gamma.spec.shape[1], None if self.B is None else self.B.spec.shape[0]
        if len(base.shape) != 2 or min(base.shape) != short or (most is not None and max(base.shape) > most):
            expected = f"a matrix whose smaller side is {short}" + ("" if most is None else f", the larger at most {most}")
            raise ShapeError("does not fit the base's weight", found=list(base.shape), expected=expected)
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def fitted(self, base: Spec) -> Self:
        return replace(self, size=base.matrix)

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        import torch

        A, B = self._bases(device)
        lambdas, gamma = (read_tensor(ref, torch.float64, device) for ref in (self.lambdas, self.gamma))
        count, short = gamma.shape
        out, width = base.shape
        right = (lambdas.unsqueeze(2) * A[:, :, :short] * gamma).flatten(0, 1)
        left = B[: max(out, width), :count].flatten(1)
        factors = (left, right) if width <= out else (right.T.contiguous(), left.T.contiguous())
        return exact_rows(*factors, base, self.scale * scale)

    def _bases(self, device: str) -> tuple[Tensor, Tensor]:
        import torch

        if self.bank is not None:
            A, B = self.bank.tensors
            return A.to(device, torch.float64), B.to(device, torch.float64)
        assert self.A is not None and self.B is not None
        for copy, whole in ((self.copy_a, self.A), (self.copy_b, self.B)):
            if copy is not None and not same_bytes(copy, whole):
                remedy = "save the adapter again with the peft that trained it"
                raise FormatError("a module's copy of a shared basis differs from the one that all layers share", remedy=remedy)
        return read_tensor(self.A, torch.float64, device), read_tensor(self.B, torch.float64, device)
