"""Factors of fused weights taken apart by their rows and put together again: bytes moved about, never arithmetic.

A fused change whose slots have factors of their own is one product of rank Σ rᵢ: the As one above the other, and in B the rows of
each slot in columns of their own, zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, NotExpressible, ShapeError
from loratools.formats._derived import Derived, Joined, cells
from loratools.formats._heads import Rows
from loratools.formats._refused import KEPT
from loratools.formats._scale import exact_alpha
from loratools.refs import Buffer, Ref
from loratools.tensorfile import file_of

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Piece:
    """The change of one slot: A (r, in), B (rows, r), ΔW = alpha/r · B·A; `magnitude` (rows) of DoRA."""

    A: Ref
    B: Ref
    alpha: float
    magnitude: Ref | None = None

    def __post_init__(self) -> None:
        LowRank(A=self.A, B=self.B, alpha=self.alpha)  # raises ShapeError where they do not meet
        if self.magnitude is not None and self.magnitude.spec.shape != self.B.spec.shape[:1]:
            raise ShapeError("a magnitude of another size than B", found=list(self.magnitude.spec.shape), expected=[self.B.spec.shape[0]])

    @property
    def rank(self) -> int:
        return self.A.spec.shape[0]

    @property
    def rows(self) -> int:
        return self.B.spec.shape[0]

    def delta(self) -> Delta:
        low = LowRank(A=self.A, B=self.B, alpha=self.alpha, layer="linear")
        return low if self.magnitude is None else DoRA(direction=low, magnitude=self.magnitude.reshape(self.rows, 1))

    def part(self, rows: Rows) -> Piece:
        """Some of its rows, in the order given."""
        magnitude = None if self.magnitude is None else picked(self.magnitude, rows)
        return Piece(self.A, picked(self.B, rows), self.alpha, magnitude)


def piece_of(delta: Delta, plain: str | None = None) -> Piece:
    """A LoRA, or a DoRA along rows, of a linear layer as a piece; `plain` tells of formats that have no DoRA that they have none.

    Raises NotExpressible for other deltas.
    """
    low = delta.direction if isinstance(delta, DoRA) else delta
    if not isinstance(low, LowRank):
        raise NotExpressible(f"no place for {delta.called} delta, but for LoRA of linear layers", remedy="convert --kind lora first")
    if low.layer not in ("linear", "unknown") or len(low.A.spec.shape) != 2:
        lies = "conv" if len(low.A.spec.shape) != 2 else low.layer
        raise NotExpressible(f"no place for LoRA of a weight that lies as {lies} ones do, but of linear layers", remedy=KEPT)
    if not isinstance(delta, DoRA):
        return Piece(low.A, low.B, _alpha(low))
    if plain is not None:
        raise NotExpressible(plain, remedy="convert --kind lora --base")
    if delta.axis != "out":
        raise NotExpressible("DoRA along rows only", remedy="convert --magnitude-axis out --base")
    return Piece(low.A, low.B, _alpha(low), delta.magnitude.reshape(low.B.spec.shape[0]))


def _alpha(low: LowRank) -> float:
    return exact_alpha(low.scaling, low.rank) if low.rslora else low.alpha


def picked(ref: Ref, rows: Rows) -> Ref:
    """Rows of a matrix or a vector, in the order given; the tensor itself where they are all of its rows in theirs."""
    if rows == list(range(ref.spec.shape[0])):
        return ref
    return Derived(ref, (len(rows), *ref.spec.shape[1:]), lambda found: found[rows])


def spread(B: Ref, rows: Rows, block: int, blocks: int, total: int) -> Ref:
    """A matrix (n, r) as (total, r · blocks): row i at rows[i], in the columns of a block, zeros elsewhere."""
    rank = B.spec.shape[1]

    def make(found: np.ndarray) -> np.ndarray:
        import numpy as np

        made = np.zeros((total, blocks, rank), found.dtype)
        made[rows, block] = found
        return made.reshape(total, blocks * rank)

    return Derived(B, (total, rank * blocks), make)


class Sum(Ref):
    """Matrices of one shape and dtype of which no two have an element at one place, as one: other than zero bytes wins."""

    def __init__(self, parts: Sequence[Ref]) -> None:
        self.parts, self.spec = tuple(parts), parts[0].spec

    def read(self) -> Buffer:
        import numpy as np

        made = np.frombuffer(bytes(self.parts[0].read()), np.uint8).copy()
        for part in self.parts[1:]:
            made |= np.frombuffer(part.read(), np.uint8)
        return memoryview(made.tobytes())

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read())[start * step : stop * step]


class Waiting(Ref):
    """A tensor whose size is known and whose rows are not yet: they lie as a model has its heads, and nothing tells which."""

    def __init__(self, origin: Ref, why: AmbiguousError) -> None:
        self.origin, self.spec, self.why = origin, origin.spec, why

    def read(self) -> Buffer:
        self._refuse()

    def rows(self, start: int, stop: int) -> Buffer:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AmbiguousError(self.why.fact, file=file_of(self.origin), remedy=self.why.remedy)


def as_stored(ref: Ref) -> Ref:
    """A tensor with its rows as the file has them, where it is not known how a model has them."""
    return ref.origin if isinstance(ref, Waiting) else ref


def stacked(refs: Sequence[Ref]) -> Ref:
    """Matrices one above the other, or the one itself."""
    return refs[0] if len(refs) == 1 else Joined(tuple(refs), 0, negated=(False,) * len(refs))


def same(one: Ref, other: Ref) -> bool:
    """Whether two tensors are the same, bit for bit."""
    return one is other or (one.spec == other.spec and bytes(one.read()) == bytes(other.read()))


def together(pieces: Sequence[tuple[Piece, Rows]], total: int) -> Piece:
    """Pieces, each with its rows among the `total`, as one change of a fused weight; of one A where all have the same.

    Raises NotExpressible for a DoRA of only some of the rows and for scalings, ranks or dtypes that differ.
    """
    first = pieces[0][0]
    for piece, _ in pieces[1:]:
        if piece.alpha / piece.rank != first.alpha / first.rank:
            fact = "slots of one fused weight under several scalings"
            raise NotExpressible(fact, found=f"{first.alpha / first.rank:g}, {piece.alpha / piece.rank:g}", remedy="rescale --bake 1")
        if (piece.rank, piece.B.spec.dtype) != (first.rank, first.B.spec.dtype):
            fact = "slots of one fused weight of several ranks or dtypes"
            found = f"{first.rank} {first.B.spec.dtype}, {piece.rank} {piece.B.spec.dtype}"
            raise NotExpressible(fact, found=found, remedy="resize --rank makes the ranks one")
    shared = all(same(first.A, piece.A) for piece, _ in pieces[1:])
    count = 1 if shared else len(pieces)
    parts = [spread(piece.B, rows, 0 if shared else slot, count, total) for slot, (piece, rows) in enumerate(pieces)]
    A = first.A if shared else stacked([piece.A for piece, _ in pieces])
    return Piece(A, parts[0] if len(parts) == 1 else Sum(parts), first.alpha * count, _magnitudes(pieces, total))


def _magnitudes(pieces: Sequence[tuple[Piece, Rows]], total: int) -> Ref | None:
    held = [(piece.magnitude, rows) for piece, rows in pieces if piece.magnitude is not None]
    if not held:
        return None
    if sum(len(rows) for _, rows in held) != total:
        raise NotExpressible("a DoRA of some rows of a fused weight, and not of the others", remedy="convert --kind lora --base")
    every = [row for _, rows in held for row in rows]
    back = sorted(range(total), key=every.__getitem__)
    return picked(stacked([magnitude for magnitude, _ in held]), back)


def apart(piece: Piece, places: Sequence[Rows]) -> list[Piece | None]:
    """A fused change as one of each slot: of its own columns where B has those of each in columns of their own, else of all.

    None for a slot whose rows are all zero while others' columns are their own.
    """
    blocks = _blocks(cells(piece.B), places)
    parts = [piece.part(rows) for rows in places]
    if blocks is None:
        return list(parts)
    count = sum(block is not None for block in blocks)
    rank = piece.rank // count
    return [None if block is None else _narrow(part, block, rank, count) for part, block in zip(parts, blocks, strict=True)]


def _narrow(piece: Piece, block: int, rank: int, count: int) -> Piece:
    columns = slice(block * rank, (block + 1) * rank)
    B = Derived(piece.B, (piece.rows, rank), lambda found: found[:, columns])
    A = Derived(piece.A, (rank, piece.A.spec.shape[1]), lambda found: found[columns])
    return Piece(A, B, piece.alpha / count, piece.magnitude)


def _blocks(B: np.ndarray, places: Sequence[Rows]) -> list[int | None] | None:
    """Which block of columns each slot has to itself, in the order of slots; None where they share some."""
    import numpy as np

    bits: np.ndarray = np.asarray(B.view(np.uint8).reshape(*B.shape, -1).any(-1))
    used = [np.flatnonzero(bits[rows].any(0)) for rows in places]
    held = [index for index, columns in enumerate(used) if len(columns)]
    rank = B.shape[1] // max(1, len(held))
    if not held or B.shape[1] % len(held) or len(places) == 1:
        return None
    for block, index in enumerate(held):
        if used[index][0] < block * rank or used[index][-1] >= (block + 1) * rank:
            return None
    return [held.index(index) if index in held else None for index in range(len(places))]
