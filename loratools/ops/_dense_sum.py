"""What a method makes of several dense changes of one weight, block by block, and its best factors with a certificate.

Nothing is held but the result, in float32 where it is large, as an extraction holds a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from blake3 import blake3

from loratools.changes import Changes
from loratools.deltas.base import Delta
from loratools.differences import SMALL
from loratools.errors import NonFiniteError, OptionError, UnsupportedError
from loratools.factors import Factored, How, factor, reach
from loratools.ops._combine_options import WAYS, Options
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.merging import Blocks, Pruner

Weighted: TypeAlias = Sequence[tuple[Delta, float, int]]  # a delta, its weight, the place of its adapter
Fold: TypeAlias = "Callable[[Sequence[Tensor], Sequence[float]], Tensor]"


def factored(name: str, terms: Weighted, spec: Spec, weight: Ref | None, options: Options, *, code: str, layer: str) -> Factored:
    """The method's change as a LoRA of a rank, or of the least rank within an error, its error beside a bound of the best.

    Raises UnsupportedError for what is no matrix or convolution, NonFiniteError for changes that are not finite.
    """
    import torch

    changes = Changes([(delta, 1.0) for delta, _, _ in terms], spec, weight)
    if (changes.rows, changes.columns) != spec.matrix or len(spec.shape) < 2:
        raise UnsupportedError("what becomes of it has no low-rank form", found=list(spec.shape), expected="a matrix or a convolution")
    D = torch.empty(spec.matrix, dtype=torch.float32 if spec.numel > SMALL else torch.float64)
    squares = 0.0
    for part, rows in zip(changes.parts(), _merged(name, changes, terms, options), strict=True):
        D[part] = rows
        squares += float(torch.linalg.vector_norm(D[part], dtype=torch.float64)) ** 2
    if not math.isfinite(squares):
        raise NonFiniteError("a change of it is not finite")
    rounding = 1.01 * torch.finfo(D.dtype).eps / 2 * math.sqrt(squares)  # one rounding an element, as in `differences.Difference`
    how = How(code=code, seed=int.from_bytes(key_of(options.seed, name)[:7], "little"))
    if options.rank is not None:
        return factor(D, min(options.rank, *D.shape), how, shape=spec.shape, layer=layer, rounding=rounding)
    assert options.limit is not None
    found = reach(D, options.limit, how, shape=spec.shape, layer=layer, rounding=rounding)
    if found is None:
        raise OptionError("no rank of factors in this dtype stays within --max-error or --energy", found=code, expected=WAYS)
    return found


def whole(name: str, terms: Weighted, spec: Spec, weight: Ref | None, options: Options) -> Tensor:
    """The method's change as it is, in float64 in the weight's shape; a vector counts as one row."""
    import torch

    changes = Changes([(delta, 1.0) for delta, _, _ in terms], spec, weight)
    parts = []
    for place, (_, _, index) in enumerate(terms):
        D = torch.cat([rows.clone() for rows in changes.one(place)])
        rows = D.reshape(1, -1) if len(spec.shape) < 2 else D
        parts.append(pruner(name, partial(_once, rows), rows.numel(), index, options)(rows).reshape(spec.shape))
    return fold_of(options)(parts, [weight for _, weight, _ in terms])


def _once(rows: Tensor) -> list[Tensor]:
    return [rows]


def _merged(name: str, changes: Changes, terms: Weighted, options: Options) -> Iterator[Tensor]:
    """The method's change, a block of rows at a time in float64, in the order of `changes.parts()`."""
    weights, fold, count = [weight for _, weight, _ in terms], fold_of(options), changes.rows * changes.columns
    pruners = [pruner(name, partial(changes.one, place), count, index, options) for place, (_, _, index) in enumerate(terms)]
    for part in changes.parts():
        yield fold([prune(rows) for prune, rows in zip(pruners, changes(part), strict=True)], weights)


def fold_of(options: Options) -> Fold:
    """How a method puts pruned changes together."""
    from loratools.linalg.merging import elected, weighted_sum

    return partial(elected, signs=options.majority_sign) if options.takes("majority_sign") else weighted_sum


def pruner(name: str, blocks: Blocks, count: int, index: int, options: Options) -> Pruner:
    """What a method prunes of one change; what it draws hangs on the seed, the adapter's place and the tensor's name alone."""
    from loratools.linalg.merging import at_random, by_magnitude, by_rank

    if options.method == "sum":
        return lambda rows: rows
    key = key_of(options.seed, f"{index}:{name}")
    if options.method in ("ties", "magnitude-prune"):
        return by_magnitude(blocks, options.density, count)
    return by_rank(options.density, options.epsilon, key) if options.method == "della" else at_random(options.density, key)


def key_of(seed: int, text: str) -> bytes:
    return blake3(f"{seed}:{text}".encode()).digest()
