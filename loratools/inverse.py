"""The weight a merge began with, as well as its result tells it: W ≈ round(W′/a − d) for a change W′ = a∘(W + d).

Both who records a merge and who undoes it compute this, and only where it is not W is W written down (`corrections`). So it need
not be right, but it must be the same on every machine: products are exact (`linalg.exact`), all else is elementwise float64 in
a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.deltas.base import Affine, Keep
from loratools.refs import Buffer, Ref, Spec
from loratools.rounding import Rounding
from loratools.stream import Applied
from loratools.tensors import as_tensor, tensor_bytes, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEGMENT = 1 << 20  # elements whose corrections stand together; part of the file format


@dataclass(frozen=True)
class Inverse:
    """One changed tensor: what it was (`base`, by its spec alone), what it is now, and what was applied to it.

    `source` holds the base's bytes where they are known, that is, when a merge is recorded; then norms and the like are computed
    and handed to `keep`, which later gives them back.
    """

    applied: Applied
    base: Spec
    merged: Ref
    keep: Keep
    source: Ref | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """(rows, columns) of the base's tensor as the changes see it."""
        return self.applied.matrix() if self.applied.target.shape == self.base.shape else self.base.matrix

    def segments(self) -> Iterator[slice]:
        """Its rows in segments; they depend on its shape alone."""
        rows, columns = self.rows
        step = max(1, SEGMENT // max(1, columns))
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))

    def bind(self) -> Callable[[slice, Callable[[Buffer], object]], Iterator[tuple[slice, Buffer]]]:
        """The map of a segment to its predicted bytes, block by block; each block read of W′ is told to `seen`."""
        rows, columns = self.rows
        undo = self._undo()
        there = min(rows, self.merged.spec.numel // max(1, columns))
        merged = self.merged.reshape(self.merged.spec.numel // max(1, columns), columns)
        rounded, dtype = Rounding(), torch_dtype(self.base.dtype)
        step = max(1, self.applied.block // max(1, columns))
        held: list[Tensor] = []  # buffers that are used again: fresh pages cost more than the arithmetic

        def predicted(segment: slice, seen: Callable[[Buffer], object]) -> Iterator[tuple[slice, Buffer]]:
            import torch

            for start in range(segment.start, segment.stop, step):
                part = slice(start, min(start + step, segment.stop))
                out = torch.zeros(part.stop - part.start, columns, dtype=dtype)
                known = slice(part.start, min(part.stop, there))
                if known.start < known.stop:
                    data = merged.rows(known.start, known.stop)
                    seen(data)
                    stored = as_tensor(bytearray(data), Spec(merged.spec.dtype, (known.stop - known.start, columns)))
                    target = out[: known.stop - known.start]
                    if merged.spec.dtype == self.base.dtype and undo is None:
                        target.copy_(stored)
                    else:
                        if not held or held[0].shape != stored.shape:
                            held[:] = [torch.empty(stored.shape, dtype=torch.float64)]
                        wide = held[0].copy_(stored)
                        rounded(undo(known, wide) if undo else _within(wide, dtype), target)
                yield part, tensor_bytes(out)

        return predicted

    def _undo(self) -> Callable[[slice, Tensor], Tensor] | None:
        """The map of W′'s rows in float64 to the prediction, or None: then W′ itself is the best that is known."""
        import torch

        affine = self._affine()
        if affine is None:
            return None
        dtype, written = torch_dtype(self.base.dtype), torch.finfo(torch_dtype(self.applied.target.dtype))
        unsure = written.eps * (2 if written.bits == 64 else 1)  # at least half a unit in the last place of W′; of F64 two

        held: list[Tensor] = []

        def undo(part: slice, W: Tensor) -> Tensor:
            if not held or held[0].shape != W.shape:
                held[:] = [torch.empty_like(W), torch.empty_like(W)]
            a, d = affine(part)
            if a is not None:
                W.div_(a)
            least = torch.abs(W, out=held[0]).mul_(unsure)
            W.sub_(d)
            # what is lost in the rounding of W′ was most likely a zero, of which pruned weights have many
            W.masked_fill_(torch.abs(W, out=held[1]) <= least, 0.0)
            return _within(W, dtype)

        return undo

    def _affine(self) -> Affine | None:
        applied = self.applied
        if not applied.applications or self.merged.spec.shape != self.base.shape:
            return None
        spec = replace(self.base, dtype=applied.target.dtype)  # what was written decided how exact a delta was
        if len({delta.matrix(spec) for delta, _ in applied.applications}) > 1:
            return None
        found = [delta.affine(spec, self._read, self.keep, strength, applied.device) for delta, strength in applied.applications]
        terms = [affine for affine in found if affine is not None]
        return (terms[0] if len(terms) == 1 else _sum(terms)) if len(terms) == len(found) else None

    def _read(self, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """W in blocks, for norms; nothing when it is not known."""
        import torch

        if self.source is None:
            return
        total, columns = self.rows
        ref = self.source.reshape(total, columns)
        for start in range(0, total, rows):
            part = slice(start, min(start + rows, total))
            data = bytearray(ref.rows(part.start, part.stop))
            yield part, as_tensor(data, Spec(ref.spec.dtype, (part.stop - part.start, columns))).to(torch.float64)


def _sum(terms: list[Affine]) -> Affine:
    """W + Σ (aᵢ∘(W + dᵢ) − W) as one a∘(W + d)."""

    def rows(part: slice) -> tuple[Tensor | None, Tensor]:
        pairs = [term(part) for term in terms]
        if all(a is None for a, _ in pairs):
            total = pairs[0][1]
            for _, d in pairs[1:]:
                total = total + d
            return None, total
        weighted = [d if a is None else d * a for a, d in pairs]
        scales = [a - 1 for a, _ in pairs if a is not None]
        a, c = 1 + scales[0], weighted[0]
        for more in scales[1:]:
            a = a + more
        for term in weighted[1:]:
            c = c + term
        return a, c / a

    return rows


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounds to finite numbers of `dtype`, so that no bits are left to the machine: of nan there are many."""
    import torch

    most = torch.finfo(dtype).max
    return values.nan_to_num_(nan=0.0, posinf=most, neginf=-most).clamp_(-most, most)

