"""Matrices of one shape as one tensor, for formats that keep the factors of all experts together, and each of them alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loratools.errors import ShapeError
from loratools.refs import BLOCK_BYTES, Buffer, Ref


class Stack(Ref):
    """Matrices of one shape as one tensor (members, rows, columns), read one after the other."""

    def __init__(self, members: Sequence[Ref]) -> None:
        first = members[0].spec
        found = next((ref.spec for ref in members if ref.spec != first), None)
        if found is not None:
            raise ShapeError("factors of one stack that differ", found=found, expected=first)
        self.members, self.spec = tuple(members), replace(first, shape=(len(members), *first.shape))

    def rows(self, start: int, stop: int) -> Buffer:
        return b"".join(bytes(ref.read()) for ref in self.members[start:stop])

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
        for ref in self.members:
            yield from ref.blocks(size)


class Member(Ref):
    """One matrix of a stack (members, rows, columns), read alone."""

    def __init__(self, origin: Ref, index: int) -> None:
        self.origin, self.index, self.spec = origin, index, replace(origin.spec, shape=origin.spec.shape[1:])

    def read(self) -> Buffer:
        return self.origin.rows(self.index, self.index + 1)

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read()).cast("B")[start * step : stop * step]
