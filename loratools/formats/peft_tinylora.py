"""Which of TinyLoRA's shared vectors is a layer's: peft numbers its layers as the model registers them, which no file tells.

A layer's projections are drawn from a seed and its number, and so tell it; peft 0.21.2 `tuners/tinylora/model.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from loratools.deltas.seeded import normal
from loratools.errors import AmbiguousError, ShapeError
from loratools.refs import Ref
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

_FIRST = 256  # numbers by which projections are told apart
_CLOSE = {"F32": 1e-4, "F64": 1e-4}  # of their size: machines differ in the last bits of a normal number, bfloat16 by 2⁻⁹


def vector_of(P: Ref | None, seed: int, count: int, tied: float) -> int:
    """The number of the vector that a layer with these projections, one of `count`, has where `weight_tying` is `tied`.

    Raises AmbiguousError where the projections are those of no layer, or of several.
    """
    groups = max(1, round(count * (1 - tied)))
    number = 0 if groups == 1 or P is None else _number(P, seed, count)
    return min(number // max(1, count // groups), groups - 1)


def _number(P: Ref, seed: int, count: int) -> int:
    """Which layer its projections were drawn for."""
    import torch

    shape = P.spec.shape
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ShapeError("no projections", found=list(shape), expected="[u, r, r]")
    held = read_tensor(P, torch.float64).flatten()[:_FIRST]
    limit = _CLOSE.get(P.spec.dtype, 4e-3)
    found = [number for number in range(count) if _apart(held, _first(seed + number, shape[0], shape[1])) <= limit]
    if len(found) != 1:
        why = "which of the shared vectors is this layer's is told by its projections, and these are" + (" no" if not found else " several")
        raise AmbiguousError(f"{why} layer's", found=f"projection_seed {seed}", remedy="is that the seed it was trained with?")
    return found[0]


@lru_cache(maxsize=4096)
def _first(seed: int, count: int, rank: int) -> Tensor:
    return normal(seed, count, rank).flatten()[:_FIRST].clone()


def _apart(held: Tensor, drawn: Tensor) -> float:
    """‖held − drawn‖ / ‖drawn‖."""
    return float((held - drawn).norm() / drawn.norm())
