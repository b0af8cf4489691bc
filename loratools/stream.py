"""One weight through its deltas, block by block: read, widened, changed, rounded, measured, handed on as bytes.

The bytes do not depend on the size of the blocks: deltas promise the same bits for any rows they are asked for
(`linalg.exact`, `linalg.norms`), and everything here is elementwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.deltas.base import Additive, Bound, Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LARGE
from loratools.errors import NonFiniteError
from loratools.refs import Buffer, Ref, Spec
from loratools.rewrite import Seen
from loratools.rounding import Rounding
from loratools.statistics import Meter, Statistics, square
from loratools.tensors import as_tensor, tensor_bytes, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1 << 18  # elements: fewer pay for Python more often, more leave the cache; whole tensors were 3 × slower


@dataclass(frozen=True)
class Applied:
    """A weight and what is applied to it: `source` is None for a tensor the base lacks."""

    source: Ref | None
    target: Spec
    applications: tuple[tuple[Delta, float], ...]
    device: str = "cpu"
    block: int = BLOCK

    @property
    def same_shape(self) -> bool:
        return self.source is not None and self.source.spec.shape == self.target.shape

    @property
    def replaced(self) -> Ref | None:
        """The tensor that takes the weight's place as it is, bytes and all, where that is all that happens."""
        (delta, strength), *more = self.applications or ((None, 0.0),)
        alone = isinstance(delta, Replacement) and strength == 1 and not more
        return delta.value if isinstance(delta, Replacement) and alone and delta.value.spec.dtype == self.target.dtype else None

    def wide(self) -> torch.dtype:
        """What it is computed in: float64, but for differences added to large bfloat16 weights.

        There W and a ΔW rounded to float32 keep 16 bits more than are stored: at most 5 in 100 000 weights go to their other
        neighbour (tests/ops/test_merge_rounding.py), and half the memory passes through the cache.
        """
        import torch

        plain = self.source is not None and self.source.spec.dtype == self.target.dtype == "BF16" and self.target.numel >= LARGE
        return torch.float32 if plain and all(isinstance(delta, Additive) for delta, _ in self.applications) else torch.float64

    def matrix(self) -> tuple[int, int]:
        spec = self.source.spec if self.source is not None and self.same_shape else self.target
        views = {delta.matrix(spec) for delta, _ in self.applications} or {spec.matrix}
        # deltas that see a tensor differently meet on its finest rows, of which all views are multiples
        return views.pop() if len(views) == 1 else min(views, key=lambda view: view[1])

    def parts(self) -> Iterator[slice]:
        rows, columns = self.matrix()
        step = max(1, self.block // max(1, columns))
        step = max(step, (step + 4) // 8 * 8)  # kernels take rows eight at a time
        if any(delta.align is None for delta, _ in self.applications):
            step = max(1, rows)
        multiple = math.lcm(*(delta.align or 1 for delta, _ in self.applications)) if self.applications else 1
        step = max(multiple, step // multiple * multiple)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


def apply_blocks(applied: Applied, statistics: Statistics, seen: Seen) -> Iterator[Buffer]:
    """The bytes of W′ in blocks, from W's; each block of W read is told to `seen`, what is measured goes into `statistics`.

    Raises NonFiniteError when a value of W′ is not finite in the target's dtype.
    """
    import torch

    spec = applied.target
    columns = applied.matrix()[1]
    reader = _Reader(applied, columns) if applied.source is not None else None  # of another shape, by W's own rows
    if reader and not applied.same_shape:
        for block in applied.source.blocks() if applied.source else ():
            seen(block)
    if not spec.floating and applied.replaced is not None:  # a counter saved with its module: float64 could not hold it
        for block in applied.source.blocks() if applied.source and applied.same_shape else ():
            seen(block)
        statistics.applied, statistics.total = 1, spec.numel
        yield from applied.replaced.blocks()
        return
    apply, measured = _combined(applied, reader)
    dtype, statistics.total = torch_dtype(spec.dtype), spec.numel
    limit = torch.finfo(dtype).max if dtype.is_floating_point else math.inf
    meter, rounded, outs = Meter(statistics, whole=not measured), Rounding(), _Outs(dtype, columns)
    for index, part in enumerate(applied.parts()):
        out, data = outs.block(part.stop - part.start)
        W = reader.read(part, seen) if reader and applied.same_shape else None
        meter.before(W, index)
        new = apply(part, W)
        rounded(new, out)
        _check_finite(new, out, limit)
        meter.after(new, out)
        yield data
    if measured:
        delta, strength = applied.applications[0]
        assert isinstance(delta, Additive)
        statistics.change = (strength * delta.norm()) ** 2
    statistics.applied = len(applied.applications)


class _Outs:
    """The blocks to be written, over one buffer; a tensor and its bytes for each number of rows, made once."""

    def __init__(self, dtype: torch.dtype, columns: int) -> None:
        self.dtype, self.columns = dtype, columns
        self.made: dict[int, tuple[Tensor, memoryview]] = {}

    def block(self, rows: int) -> tuple[Tensor, memoryview]:
        import torch

        if rows not in self.made:
            first = next(iter(self.made.values()))[0] if self.made else None
            fits = first is not None and len(first) >= rows
            out = first[:rows] if first is not None and fits else torch.empty(rows, self.columns, dtype=self.dtype)
            self.made[rows] = out, tensor_bytes(out)
        return self.made[rows]


class _Reader:
    """Blocks of W in a wide dtype on a device, through buffers that are used again, with views for each number of rows made once."""

    def __init__(self, applied: Applied, columns: int) -> None:
        assert applied.source is not None
        columns = columns if applied.same_shape else applied.source.spec.matrix[1]
        self.ref = applied.source.reshape(applied.source.spec.numel // max(1, columns), columns)
        self.columns, self.device, self.wide = columns, applied.device, applied.wide()
        self.made: dict[int, tuple[memoryview, Tensor, Tensor]] = {}

    def read(self, part: slice, seen: Seen | None = None) -> Tensor:
        rows = part.stop - part.start
        if rows not in self.made:
            self.made[rows] = self._make(rows)
        raw, narrow, wide = self.made[rows]
        self.ref.readinto(part.start, part.stop, raw)
        if seen:
            seen(raw)
        return wide.copy_(narrow)

    def _make(self, rows: int) -> tuple[memoryview, Tensor, Tensor]:
        import torch

        for held, (raw, narrow, wide) in self.made.items():
            if held >= rows:
                return raw[: rows * self.ref.spec.row_bytes()], narrow[:rows], wide[:rows]
        raw = memoryview(bytearray(rows * self.ref.spec.row_bytes()))
        narrow = as_tensor(raw, Spec(self.ref.spec.dtype, (rows, self.columns)))
        return raw, narrow, torch.empty(rows, self.columns, dtype=self.wide, device=self.device)

    def blocks(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """All of W in blocks of `rows` rows, for deltas that look before they change."""
        total = self.ref.spec.shape[0]
        for start in range(0, total, rows):
            part = slice(start, min(start + rows, total))
            yield part, self.read(part)


def _combined(applied: Applied, reader: _Reader | None) -> tuple[Bound, bool]:
    """All applications as one map of blocks, and whether ‖W′ − W‖ follows from the delta without looking at the blocks."""
    # what is written decides how exact a delta must be
    spec = replace(applied.source.spec, dtype=applied.target.dtype) if applied.source else None
    read = reader.blocks if reader else (lambda rows: iter(()))
    if not applied.applications:
        return (lambda part, W: W), False
    (delta, strength), *more = applied.applications
    if not more and strength == 1:
        return delta.bind(spec, read, applied.device), isinstance(delta, Additive) and delta.factored
    assert spec is not None
    terms = [_term(delta, strength, spec, reader, applied.device) for delta, strength in applied.applications]

    def apply(part: slice, W: Tensor | None) -> Tensor:
        assert W is not None
        first, *others = [term(part, W) for term in terms] if len(terms) > 1 else [terms[0](part, W)]
        for term in others:
            first = first + term
        return W.add_(first.to(W.dtype))

    return apply, not more and isinstance(delta, Additive) and delta.factored


def _term(delta: Delta, strength: float, spec: Spec, reader: _Reader | None, device: str) -> Bound:
    """The map rows → s·(apply(W) − W) of one adapter."""
    if isinstance(delta, Additive):
        dense = delta.bind_dense(spec, strength, device)
        return lambda part, W: dense(part)
    assert reader is not None
    bound = delta.bind(spec, reader.blocks, device)

    def term(part: slice, W: Tensor | None) -> Tensor:
        assert W is not None
        return bound(part, W.clone()).sub(W).mul_(strength)

    return term


def _check_finite(new: Tensor, out: Tensor, limit: float) -> None:
    """Nothing in `out` is inf or nan: known at once when even the norm is far from the dtype's limit, else looked at."""
    import torch

    if not out.dtype.is_floating_point or square(new) < (0.99 * min(limit, 1e150)) ** 2:
        return
    wide = out.to(torch.float64)
    if not torch.isfinite(wide).all():
        worst = float(new.abs().max())  # nan if any is
        raise NonFiniteError(
            f"would not be finite in {str(out.dtype).removeprefix('torch.')}", found=f"{worst:g}", expected=f"at most {limit:g}",
            remedy="give a wider --dtype, a lower strength, or look at the adapter with inspect --values",
        )  # fmt: skip


def cast_blocks(ref: Ref, target: Spec, block: int, seen: Seen) -> Iterator[Buffer]:
    """A tensor in another floating dtype, rounded once. Raises NonFiniteError for values that become inf."""
    applied = Applied(ref, target, (), "cpu", block)
    yield from apply_blocks(applied, Statistics(kinds=()), seen)
