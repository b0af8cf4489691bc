"""Experts: a LoRA of every matrix in a fused stack, in two tensors as peft's `ParamWrapper` holds them.

Read from peft 0.21.2, `tuners/lora/layer.py::ParamWrapper.get_delta_weight`. A is (experts·r, in), the rows of an expert together;
B is (out, r·experts), its columns either rank by rank, the experts fastest (`rank_major`, peft's own), or expert by expert
(`grouped_by_expert`, as Unsloth writes them).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

from loratools.deltas.base import Additive, Dense
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parts import in_turn
from loratools.errors import ShapeError
from loratools.refs import InMemory, Ref, Spec
from loratools.sliced import Sliced

PACKINGS = ("rank_major", "grouped_by_expert")


@dataclass(frozen=True, eq=False, kw_only=True)
class Experts(Additive):
    """W′[e] = W[e] + scaling·Bₑ·Aₑ for W (experts, out, in), or its transpose for W (experts, in, out) if `turned`.

    Raises ShapeError when A and B do not meet, or do not hold as many rows and columns for each expert.
    """

    kind = "experts"
    reproducible = True
    factored = True

    A: Ref
    B: Ref
    alpha: float
    experts: int
    rslora: bool = False
    turned: bool = False
    packing: str = PACKINGS[0]

    def __post_init__(self) -> None:
        a, b = self.A.spec.shape, self.B.spec.shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0 or a[0] % self.experts:
            expected = f"A [{self.experts}·rank, in], B [out, rank·{self.experts}]"
            raise ShapeError("not the factors of so many experts", found=f"A {list(a)}, B {list(b)}", expected=expected)

    @property
    def rank(self) -> int:
        """The rank of each expert's difference."""
        return self.A.spec.shape[0] // self.experts

    @property
    def scaling(self) -> float:
        return self.expert(0).scaling

    def shape(self) -> tuple[int, ...]:
        return (self.experts, *self.expert(0).shape())

    def matrix(self, base: Spec) -> tuple[int, int]:
        return base.numel // base.shape[-1], base.shape[-1]

    def expert(self, index: int, rows: slice = slice(None)) -> LowRank:
        """The difference of one expert's matrix, or of some rows of it."""
        own = slice(index * self.rank, (index + 1) * self.rank)
        picked = slice(index, None, self.experts) if self.packing == PACKINGS[0] else own
        if self.turned:
            A, B = Sliced(self.B, columns=picked).T, Sliced(self.A, own, rows).T
        else:
            A, B = Sliced(self.A, own), Sliced(self.B, rows, picked)
        return LowRank(A=A, B=B, alpha=self.alpha, rslora=self.rslora, layer="linear")

    def facts(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "scaling": self.scaling, "experts": self.experts}

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        held = self._held()
        inner, height = replace(base, shape=base.shape[1:]), base.shape[1]
        places = [(index * height, (index + 1) * height) for index in range(self.experts)]
        return in_turn(places, lambda index: held.expert(index).bind_dense(inner, scale, device), base.shape[-1], device)

    def norm(self) -> float:
        held = self._held()
        return math.sqrt(math.fsum(held.expert(index).norm() ** 2 for index in range(self.experts)))

    def _held(self) -> Self:
        """The same with its bytes at hand: every expert's columns run through all of B."""
        return self.map(lambda ref: InMemory(ref.spec, ref.read()))
