"""A part of a matrix on disk as a tensor of its own: some rows, and of each the columns a slice picks."""

from __future__ import annotations

import threading
from dataclasses import replace

from loratools.refs import BITS, Buffer, Ref, Spec


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


class Pool:
    """The bytes of the last few tensors that were read through it, for those of which many parts are read one after another."""

    def __init__(self, count: int = 4) -> None:
        self.count = count
        self._held: dict[int, tuple[Ref, Buffer]] = {}  # by identity: two tensors may hold the same bytes
        self._lock = threading.Lock()

    def read(self, ref: Ref) -> Buffer:
        with self._lock:
            found = self._held.pop(id(ref), None) or (ref, ref.read())
            self._held[id(ref)] = found  # the last one read stands last
            while len(self._held) > self.count:
                del self._held[next(iter(self._held))]
            return found[1]


class Pooled(Ref):
    """A tensor whose bytes a pool keeps for a while."""

    def __init__(self, origin: Ref, pool: Pool) -> None:
        self.origin, self.pool, self.spec = origin, pool, origin.spec

    def read(self) -> Buffer:
        return self.pool.read(self.origin)

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read()).cast("B")[start * step : stop * step]


class Blocks(Ref):
    """A matrix that is others at some rows and columns, and zeros elsewhere; only what lies in the rows asked for is read."""

    def __init__(self, spec: Spec, blocks: tuple[tuple[Ref, int, int], ...]) -> None:
        self.spec, self.blocks_at = spec, blocks

    def rows(self, start: int, stop: int) -> Buffer:
        import numpy as np

        cells = np.zeros((stop - start, self.spec.shape[1]), dtype=f"V{BITS[self.spec.dtype] // 8}")
        for ref, row, column in self.blocks_at:
            height, width = ref.spec.shape
            low, high = max(start, row), min(stop, row + height)
            if low < high:
                data = np.frombuffer(ref.rows(low - row, high - row), dtype=cells.dtype).reshape(high - low, width)
                cells[low - start : high - start, column : column + width] = data
        return memoryview(cells.tobytes())
