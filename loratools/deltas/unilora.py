"""UniLoRA: a LoRA whose every number is one of a single short vector θ that all layers share, times a scale.

Li et al. 2025 (arXiv:2506.00799), section 3; peft 0.21.2 `tuners/unilora/layer.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Product
from loratools.deltas.indexed import read_places, require_whole
from loratools.errors import ShapeError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class UniLoRA(Product):
    """W′ = W + (θ[indices_b] ∘ scales_b)·(θ[indices_a] ∘ scales_a), A's (r, in), B's (out, r), θ (d).

    Raises ShapeError when they do not meet, FormatError for indices that are no whole numbers or, later, point outside θ.
    """

    kind = "unilora"
    indices = ("indices_a", "indices_b")

    theta: Ref
    indices_a: Ref
    scales_a: Ref
    indices_b: Ref
    scales_b: Ref

    def __post_init__(self) -> None:
        A, B, theta = self.indices_a.spec.shape, self.indices_b.spec.shape, self.theta.spec.shape
        alike = self.scales_a.spec.shape == A and self.scales_b.spec.shape == B
        if [len(A), len(B), len(theta)] != [2, 2, 1] or A[0] != B[1] or not alike:
            found = f"A {list(A)} and {list(self.scales_a.spec.shape)}, B {list(B)} and {list(self.scales_b.spec.shape)}, θ {list(theta)}"
            expected = "A's [r, in], B's [out, r], θ [d]"
            raise ShapeError("the indices, scales and θ do not meet", found=found, expected=expected)
        require_whole(self.indices_a, self.indices_b)

    def shape(self) -> tuple[int, ...]:
        return self.indices_b.spec.shape[0], self.indices_a.spec.shape[1]

    def facts(self) -> dict[str, Any]:
        return {"rank": self.indices_a.spec.shape[0]}

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        theta = read_tensor(self.theta, torch.float64, device)

        def factor(indices: Ref, scales: Ref) -> Tensor:
            return theta[read_places(indices, len(theta), device=device)] * read_tensor(scales, torch.float64, device)

        return factor(self.indices_b, self.scales_b), factor(self.indices_a, self.scales_a)
