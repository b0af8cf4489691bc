"""VB-LoRA: a LoRA whose every stretch of `length` numbers is a mixture of a few vectors of a bank that all layers share.

Li et al. 2024 (arXiv:2405.15179), section 3; peft 0.21.2 `tuners/vblora/layer.py`, `model.py`. The weights of a mixture are the softmax
of its k largest logits; a file holds all logits, or which k they are and all weights but the last, which is 1 minus their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.deltas.base import Product
from loratools.deltas.indexed import read_places, require_whole
from loratools.errors import AmbiguousError, FormatError, NonFiniteError, ShapeError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

_SLACK = 1e-2  # by which weights may add up to more than 1: bfloat16 rounds each by 2⁻⁹


class Mixture(NamedTuple):
    """Weights (…, k) of the vectors at places (…, k)."""

    weights: Tensor
    places: Tensor

    def of(self, vectors: Tensor) -> Tensor:
        """(…, length), summed in the order of the places."""
        parts = [self.weights[..., k, None] * vectors[self.places[..., k]] for k in range(self.weights.shape[-1])]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


@dataclass(frozen=True, eq=False, kw_only=True)
class VBLoRA(Product):
    """W′ = W + B·A, A (r, in) of mixtures (r, in/length), B (out, r) of mixtures (out/length, r), vectors (count, length).

    A side is `logits` (…, count), or `places` (…, topk) with `weights` (…, topk − 1). Raises ShapeError when they do not meet, FormatError
    for places that are no whole numbers; later AmbiguousError where two logits tie for the last place, which machines decide unlike.
    """

    kind = "vblora"
    indices = ("places_a", "places_b")

    vectors: Ref
    topk: int
    logits_a: Ref | None = None
    places_a: Ref | None = None
    weights_a: Ref | None = None
    logits_b: Ref | None = None
    places_b: Ref | None = None
    weights_b: Ref | None = None

    def __post_init__(self) -> None:
        sides = {name: ref.spec.shape for name, ref in self.refs().items() if name != "vectors"}
        bank = self.vectors.spec.shape
        last = {"logits": bank[0] if bank else 0, "places": self.topk, "weights": self.topk - 1}
        good = len(bank) == 2 and 1 <= self.topk <= bank[0] and all(len(shape) == 3 for shape in sides.values())
        good = good and all(shape[2] == last[name[:-2]] for name, shape in sides.items())
        alike = [{shape[:2] for name, shape in sides.items() if name.endswith(side)} for side in "ab"]
        if not good or any(len(found) != 1 for found in alike) or next(iter(alike[0]))[0] != next(iter(alike[1]))[1]:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in {"vectors": bank, **sides}.items())
            expected = f"A's [r, in/length, n], B's [out/length, r, n] with {last} for n, vectors [count, length]"
            raise ShapeError("the mixtures and their vectors do not meet", found=found, expected=expected)
        require_whole(*(ref for ref in (self.places_a, self.places_b) if ref is not None))

    @property
    def reproducible(self) -> bool:  # type: ignore[override]
        """Not from logits: machines may differ in the last bit of an exponential."""
        return self.logits_a is None and self.logits_b is None

    def _extent(self, side: str) -> tuple[int, int]:
        ref = getattr(self, f"logits_{side}") or getattr(self, f"places_{side}")
        first, second = ref.spec.shape[:2]
        return first, second

    def shape(self) -> tuple[int, ...]:
        length = self.vectors.spec.shape[1]
        return self._extent("b")[0] * length, self._extent("a")[1] * length

    def facts(self) -> dict[str, Any]:
        return {"rank": self._extent("a")[0]}

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        import torch

        vectors = read_tensor(self.vectors, torch.float64, device)
        A = self._mixture("a", device).of(vectors).flatten(1)
        B = self._mixture("b", device).of(vectors).transpose(1, 2).flatten(0, 1)
        return B.contiguous(), A.contiguous()

    def _mixture(self, side: str, device: str) -> Mixture:
        import torch

        logits, places, weights = (getattr(self, f"{name}_{side}") for name in ("logits", "places", "weights"))
        if logits is not None:
            return largest(read_tensor(logits, torch.float64, device), self.topk)
        return stored(read_tensor(weights, torch.float64, device), read_places(places, self.vectors.spec.shape[0], device=device))


def largest(logits: Tensor, count: int) -> Mixture:
    """The `count` largest of each row and their softmax.

    >>> import torch
    >>> largest(torch.tensor([[0.0, 3.0, 3.0, -1.0]]), 2).weights.tolist()
    [[0.5, 0.5]]
    """
    import torch

    if bool((torch.isnan(logits) | (logits == torch.inf)).any()):
        raise NonFiniteError("a logit is inf or nan")
    values, places = torch.sort(logits, dim=-1, descending=True, stable=True)
    if count < values.shape[-1]:
        tied = (values[..., count - 1] == values[..., count]) & torch.isfinite(values[..., count])
        if bool(tied.any()):
            remedy = "save it with save_only_topk_weights=True on the machine that trained it"
            raise AmbiguousError(f"two logits tie for place {count} of a mixture", found=f"{int(tied.sum())} such mixtures", remedy=remedy)
    powers = torch.exp(values[..., :count] - values[..., :1])
    total = powers[..., :1]
    for k in range(1, count):
        total = total + powers[..., k : k + 1]
    return Mixture(powers / total, places[..., :count])


def stored(weights: Tensor, places: Tensor) -> Mixture:
    """Weights but the last, which is what they lack of 1. Raises FormatError for those that no softmax has."""
    import torch

    last = weights.new_ones(*weights.shape[:-1], 1)
    for k in range(weights.shape[-1]):
        last = last - weights[..., k : k + 1]
    if bool((~torch.isfinite(last)).any()) or bool((weights < 0).any()) or bool((last < -_SLACK).any()):
        raise FormatError("weights that no softmax has", expected="none below 0, and a sum of at most 1")
    return Mixture(torch.cat([weights, last], dim=-1), places)
