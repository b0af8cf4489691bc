"""Weights stored as codes with scales, read as the numbers they stand for: computed in float64, rounded once to a plain dtype.

    fp8     W = code · scale, a scale for each block, each row, or the whole weight
            (DeepSeek-V3's kernel.py, transformers' finegrained_fp8.py and fbgemm_fp8.py, ComfyUI's scale_weight)
    4 bits  W = map[code] · absmax of its block of consecutive weights; two codes a byte, the first in the high half
            absmax itself plain, or map₂[code₂] · absmax₂ + offset (QLoRA, arXiv 2305.14314; bitsandbytes' functional.py)

Any stretch of rows is read without the rest, so a large weight is never whole in memory.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

from loratools.errors import NonFiniteError
from loratools.refs import BITS, BLOCK_BYTES, Buffer, Ref, Spec
from loratools.tensors import as_tensor, read_tensor, tensor_bytes, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class Coded(Ref):
    """A weight of `spec`, whose values are computed from codes when asked for. Raises NonFiniteError for values beyond its dtype."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @abstractmethod
    def values(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened weight, float64."""

    def rows(self, start: int, stop: int) -> Buffer:
        columns = self.spec.matrix[1]
        return self._bytes(start * columns, stop * columns)

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
        step = max(1, size * 8 // BITS[self.spec.dtype])
        for start in range(0, self.spec.numel, step):
            yield self._bytes(start, min(start + step, self.spec.numel))

    def reshape(self, *shape: int) -> Self:
        other = copy.copy(self)
        other.spec = replace(self.spec, shape=shape)
        return other

    def _bytes(self, start: int, stop: int) -> Buffer:
        import torch

        from loratools.rounding import Rounding  # which imports numpy: headers are read without

        wide = self.values(start, stop)
        out = torch.empty(wide.shape, dtype=torch_dtype(self.spec.dtype))
        Rounding()(wide, out)
        if not torch.isfinite(out).all():
            fact, found = f"would not be finite in {str(out.dtype).removeprefix('torch.')}", f"{float(wide.abs().max()):g}"
            raise NonFiniteError(fact, found=found, remedy="give a wider --dtype")
        return tensor_bytes(out)


class Scaled(Coded):
    """fp8 codes times scales: `scale` has one element, one for each row, or one for each block of `block` (rows, columns).

    The last axis is the columns; a stack of matrices, (experts, rows, columns), has a grid of scales for each, blocks at the
    edges being cut off.
    """

    def __init__(self, codes: Ref, scale: Ref | None, spec: Spec, block: tuple[int, int] | None = None) -> None:
        super().__init__(spec)
        self.scale, self.block = scale, block
        self.shape = codes.spec.shape
        self.columns = self.shape[-1] if self.shape else 1
        self.codes = codes.reshape(codes.spec.numel // max(1, self.columns), self.columns)

    def values(self, start: int, stop: int) -> Tensor:
        import torch

        first, last = start // self.columns, -(-stop // self.columns)
        data = bytearray(self.codes.rows(first, last))
        codes = as_tensor(data, Spec(self.codes.spec.dtype, (last - first, self.columns)))
        wide = codes.to(torch.float32).to(torch.float64)
        if self.scale is not None:
            wide *= self._scales(first, last)
        return wide.view(-1)[start - first * self.columns : stop - first * self.columns]

    @cached_property
    def _table(self) -> Tensor:
        import torch

        assert self.scale is not None
        return read_tensor(self.scale).to(torch.float32 if BITS[self.scale.spec.dtype] < 32 else torch.float64).to(torch.float64)

    def _scales(self, first: int, last: int) -> Tensor:
        """What rows [first, last) are multiplied by."""
        import torch

        table = self._table
        if table.numel() == 1:
            return table.view(1, 1)
        if self.block is None:
            return table.view(-1, 1)[first:last]
        rows, (height, width) = self.shape[-2], self.block
        index = torch.arange(first, last)
        grid = table.view(-1, table.shape[-1])
        line = grid[index // rows * table.shape[-2] + index % rows // height]
        return line.repeat_interleave(width, dim=1)[:, : self.columns]


class FourBit(Coded):
    """bitsandbytes' nf4 and fp4: `packed` bytes, a `table` of 16 values, and `absmax` for each `size` consecutive weights.

    With `nested` (codes' table of 256, absmax₂, its block size, offset) absmax is itself stored as codes of 8 bits.
    """

    def __init__(
        self, packed: Ref, table: Ref, absmax: Ref, size: int, spec: Spec, nested: tuple[Ref, Ref, int, float] | None = None
    ) -> None:
        super().__init__(spec)
        self.packed, self.table, self.absmax, self.size, self.nested = packed.as_bytes(), table, absmax, size, nested

    def values(self, start: int, stop: int) -> Tensor:
        import torch

        first = start // 2
        data = as_tensor(bytearray(self.packed.rows(first, -(-stop // 2))), Spec("U8", (-(-stop // 2) - first,)))
        wide = self._pairs[data.to(torch.int64)].view(-1)[start - 2 * first : stop - 2 * first]
        block = start // self.size
        scale = self._absmax(block, -(-stop // self.size)).repeat_interleave(self.size)
        return wide * scale[start - block * self.size : stop - block * self.size]

    @cached_property
    def _pairs(self) -> Tensor:
        """The two values of each byte."""
        import torch

        table = read_tensor(self.table, torch.float64).view(-1)
        return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)

    @cached_property
    def _nested(self) -> tuple[Tensor, Tensor]:
        import torch

        assert self.nested is not None
        return read_tensor(self.nested[0], torch.float64).view(-1), read_tensor(self.nested[1], torch.float64).view(-1)

    def _absmax(self, first: int, last: int) -> Tensor:
        """The scales of blocks [first, last)."""
        import torch

        ref = self.absmax.reshape(self.absmax.spec.numel)
        found = as_tensor(bytearray(ref.rows(first, last)), Spec(ref.spec.dtype, (last - first,)))
        if self.nested is None:
            return found.to(torch.float64)
        (codes, above), (_, _, size, offset) = self._nested, self.nested
        return codes[found.to(torch.int64)] * above[torch.arange(first, last) // size] + offset
