"""LoRA on what initialisation left of a weight: PiSSA and OLoRA move a part of W into the first factors, and train from there.

PiSSA (Meng et al. 2024, arXiv:2404.02948) moves the r leading singular components, OLoRA (Büyükakyüz 2024, arXiv:2406.01775) the
projection on the span of the first r columns, scaling times; peft 0.21.2 `tuners/lora/layer.py::pissa_init`, `olora_init`. No file
holds the part: it is computed again from the base, and only used where the trained factors are seen to have come from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from loratools.deltas.base import Bound, Delta, Read
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor

INITS = ("pissa", "olora")
FAR = 0.5  # of the part's norm: unrelated factors of the part's size are √2 away, training moves them by a few hundredths
_REMEDY = "give the adapter as it was initialised with --initial"


@dataclass(frozen=True, eq=False, kw_only=True)
class Residual(Delta):
    """W′ = `then` applied to W − moved(W), for a linear layer's W (out, in), rank at most min(out, in).

    It sees the whole weight, which is held in float64 beside its singular vectors. Raises UnsupportedError where the part that was
    moved cannot be computed surely, or where the factors are not near what it is.
    """

    init: str
    then: LowRank | DoRA

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.init

    @property
    def low(self) -> LowRank:
        inner = self.then.direction if isinstance(self.then, DoRA) else self.then
        assert isinstance(inner, LowRank)
        return inner

    def spec(self, base: Spec | None) -> Spec:
        found = self.then.spec(base)
        if len(found.shape) != 2 or self.low.rank > min(found.shape):
            fact = f"no weight that {self.init} could have moved a part of this rank from"
            raise ShapeError(fact, found=list(found.shape), expected=f"a matrix with both sides {self.low.rank} or more")
        return found

    def facts(self) -> dict[str, Any]:
        return self.then.facts()

    @property
    def align(self) -> int | None:
        return None

    def refs(self) -> dict[str, Ref]:
        return self.then.refs()

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        return replace(self, then=self.then.map(fn))

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        ((whole, W),) = read(base.matrix[0])
        left = W - self._moved(W, device)

        def read_left(rows: int) -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, whole.stop, rows):
                part = slice(start, min(start + rows, whole.stop))
                yield part, left[part].clone()

        then = self.then.bind(base, read_left, device)
        return lambda part, _: then(part, left[part].clone())

    def _moved(self, W: Tensor, device: str) -> Tensor:
        """What initialisation took from W. Raises UnsupportedError where it is not sure, or not what the factors came from."""
        from loratools.linalg.parts import LIMIT

        start, doubt = _principal(W, self.low.rank) if self.init == "pissa" else _projection(W, self.low.rank)
        times = 1.0 if self.init == "pissa" else self.low.scaling
        if doubt > LIMIT:
            fact = f"what {self.init} moved from this weight is not sure: peft computed it in float32"
            raise UnsupportedError(fact, found=f"off by up to {doubt:.1g} of ‖W‖", expected=f"at most {LIMIT:.1g}", remedy=_REMEDY)
        apart = self._apart(start, times, device)
        if not apart <= FAR:
            raise UnsupportedError(
                f"the factors did not come from what {self.init} moves from this weight: is it the base that was trained, or a residual?",
                found=f"{apart:.2g} of its norm apart", expected=f"at most {FAR}", remedy=_REMEDY,
            )  # fmt: skip
        return start * times

    def _apart(self, start: Tensor, times: float, device: str) -> float:
        """‖scaling·B·A − times·start‖ / ‖times·start‖."""
        import torch

        B, A = self.low.factors(device)
        norm = abs(times) * float(torch.linalg.vector_norm(start))
        return float(torch.linalg.vector_norm(self.low.scaling * (B @ A) - times * start)) / norm if norm else math.inf


def _principal(W: Tensor, rank: int) -> tuple[Tensor, float]:
    """The `rank` leading singular components as one matrix, and how far float32 may have moved it, relative to ‖W‖."""
    from loratools.linalg.parts import parts

    found = parts(W)
    return found.between(0, rank), found.doubt(rank)


def _projection(W: Tensor, rank: int) -> tuple[Tensor, float]:
    """Q[:, :rank]·R[:rank] of W = Q·R, W projected on the span of its first columns, and the same bound by their condition."""
    import torch

    Q, R = torch.linalg.qr(W[:, :rank])
    sigma = torch.linalg.svdvals(R)
    start = Q @ (Q.T @ W)
    norm, condition = float(torch.linalg.vector_norm(W)), float(sigma[0] / sigma[-1])
    share = float(torch.linalg.vector_norm(start)) / norm if norm else 0.0
    return start, 4 * 2.0**-24 * condition * share if math.isfinite(condition) else math.inf
