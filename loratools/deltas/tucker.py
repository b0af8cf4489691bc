"""Tucker: LoRA of a convolution whose kernel stands between its factors, ΔW = scaling · Σᵢⱼ up[·, i]·mid[i, j, …]·down[j, ·].

LyCORIS' LoCon with `use_tucker` (`modules/locon.py`): mid's first axis meets `up`, its second `down`. With mid and down contracted it is
a product of rank r like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.deltas.base import Product
from loratools.deltas.cored import cored
from loratools.errors import ShapeError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Tucker(Product):
    """W′ = W + (alpha/r)·up·(mid·down), up (out, r), mid (r, r, *kernel), down (r, in). Raises ShapeError when they do not meet."""

    kind = "tucker"

    up: Ref
    mid: Ref
    down: Ref
    alpha: float

    def __post_init__(self) -> None:
        up, mid, down = (ref.spec.shape for ref in (self.up, self.mid, self.down))
        if len(up) != 2 or len(down) != 2 or len(mid) < 3 or mid[:2] != (up[1], down[0]):
            found = f"up {list(up)}, mid {list(mid)}, down {list(down)}"
            raise ShapeError("the factors do not meet", found=found, expected="up [out, r], mid [r, r, *kernel], down [r, in]")

    @property
    def rank(self) -> int:
        return self.down.spec.shape[0]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def shape(self) -> tuple[int, ...]:
        return (self.up.spec.shape[0], self.down.spec.shape[1], *self.mid.spec.shape[2:])

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling}

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        up, mid, down = (read_tensor(ref, torch.float64, device) for ref in (self.up, self.mid, self.down))
        return up * self.scaling, cored(mid, down)
