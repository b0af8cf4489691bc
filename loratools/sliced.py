"""A part of a matrix on disk as a tensor of its own: some rows, and of each the columns a slice picks."""

from __future__ import annotations

from dataclasses import replace

from loratools.tensorfile import BITS, Buffer, Ref


class Sliced(Ref):
    """Rows `rows` of a matrix, of each the columns `columns`; only those rows are read.

    Columns may be picked with a step: those of one expert of a fused stack lie as far apart as there are experts.
    """

    def __init__(self, origin: Ref, rows: slice = slice(None), columns: slice = slice(None)) -> None:
        height, width = origin.spec.shape
        self.origin, self.columns = origin, columns
        self.start, stop, _ = rows.indices(height)
        self.spec = replace(origin.spec, shape=(stop - self.start, len(range(width)[columns])))

    def rows(self, start: int, stop: int) -> Buffer:
        import numpy as np

        data = self.origin.rows(self.start + start, self.start + stop)
        if self.spec.shape[1] == self.origin.spec.shape[1]:
            return data
        cells = np.frombuffer(data, dtype=f"V{BITS[self.spec.dtype] // 8}").reshape(stop - start, self.origin.spec.shape[1])
        return memoryview(np.ascontiguousarray(cells[:, self.columns]).tobytes())
