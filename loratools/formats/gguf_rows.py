"""Factors laid as llama.cpp has them: rows of q and k interleaved, ranks filled up with zeros, experts stacked. Never arithmetic.

    HF → GGUF   rows (heads, 2, half) → (heads, half, 2)       `LlamaModel.permute` of llama.cpp's conversion/llama.py

Rotary embeddings turn pairs of rows: transformers pairs row i with i + half of its head, ggml's `LLAMA_ROPE_TYPE_NORM` neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import AmbiguousError, ShapeError
from loratools.formats._derived import Derived
from loratools.formats._pieces import Waiting
from loratools.refs import Ref

if TYPE_CHECKING:
    import numpy as np


def interleaved(B: Ref, heads: int) -> Ref:
    """B (out, rank) of q or k with its rows as llama.cpp wants them. Raises ShapeError where its rows are no pairs of so many heads."""
    return _laid(B, heads, (2, _half(B, heads)))


def halved(B: Ref, heads: int) -> Ref:
    """B (out, rank) of q or k as llama.cpp has it, with its rows as transformers has them: undoes `interleaved`."""
    return _laid(B, heads, (_half(B, heads), 2))


def _half(B: Ref, heads: int) -> int:
    half, odd = divmod(B.spec.shape[0], 2 * heads)
    if odd or not half:
        raise ShapeError("rows that are no pairs of all heads", found=B.spec.shape[0], expected=f"a multiple of {2 * heads}")
    return half


def _laid(B: Ref, heads: int, pairs: tuple[int, int]) -> Ref:
    shape = B.spec.shape
    return Derived(B, shape, lambda found: found.reshape(heads, *pairs, *shape[1:]).swapaxes(1, 2).reshape(shape))


def waiting(B: Ref) -> Waiting:
    """B of q or k as llama.cpp has it, of a model whose number of heads is not known yet."""
    fact = "rows that llama.cpp interleaved by the model's heads, whose number the file does not tell"
    return Waiting(B, AmbiguousError(fact, remedy="give --base a model with its config.json"))


def filled(ref: Ref, rank: int, axis: int) -> Ref:
    """A factor of that rank, zeros added at the end of the axis its rank is on."""
    shape = tuple(rank if index == axis else size for index, size in enumerate(ref.spec.shape))

    def make(found: np.ndarray) -> np.ndarray:
        import numpy as np

        made = np.zeros(shape, found.dtype)
        made[tuple(slice(size) for size in found.shape)] = found
        return made

    return ref if shape == ref.spec.shape else Derived(ref, shape, make)
