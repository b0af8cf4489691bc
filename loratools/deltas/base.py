"""A delta: a value object that turns a weight W into W′.

Rows are those of W seen as the matrix `delta.matrix(spec)`: the first axis, and all others as columns, unless a kind says
otherwise. Blocks of rows reach a delta in float64; it answers in float64, and the one rounding is the writer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

from loratools.errors import ShapeError, UnsupportedError
from loratools.tensorfile import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor

Read: TypeAlias = "Callable[[int], Iterator[tuple[slice, Tensor]]]"  # rows a block -> W's blocks in order
Bound: TypeAlias = "Callable[[slice, Tensor | None], Tensor]"  # may overwrite and return the block it is given
Dense: TypeAlias = "Callable[[slice], Tensor]"  # valid until the next call
Affine: TypeAlias = "Callable[[slice], tuple[Tensor | None, Tensor]]"  # rows -> (a, d); d is valid until the next call
Keep: TypeAlias = "Callable[[Callable[[], Tensor]], Tensor]"  # a vector made now and written down, or one written down before


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta(ABC):
    """The change of one weight; its tensors are `Ref`s, so a delta of a header costs no data."""

    kind: ClassVar[str]

    @abstractmethod
    def spec(self, base: Spec | None) -> Spec:
        """What W′ will be, from headers alone; `base` is None when the base lacks the tensor.

        Raises ShapeError when the delta does not fit, MatchError when it needs a weight that is not there.
        """

    @abstractmethod
    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        """The map rows, W[rows] → W′[rows] for one weight; `read(n)` gives W in blocks of n rows for kinds that look first."""

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        """The map W′ = a∘(W + d) of `strength` of this change as rows → (a, d), by which a merge is undone; an `a` of None is 1.

        None where W′ does not tell W, or where another machine could compute another d. What only W tells, such as norms, goes
        through `keep`: it is written down when a merge is recorded and given back when it is undone, when `read` gives nothing.
        """
        return None

    @property
    def align(self) -> int | None:
        """Rows it must see together: 1 a row, b blocks of b, None the whole tensor."""
        return 1

    @property
    def needs_base(self) -> bool:
        """Whether a base tensor of its name must exist."""
        return True

    def matrix(self, base: Spec) -> tuple[int, int]:
        """(rows, columns) of the weight as this delta sees it."""
        return base.matrix

    def refs(self) -> dict[str, Ref]:
        """The tensors it is made of, by field."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in own.items() if isinstance(value, Ref)}

    def map(self, fn: Callable[[Ref], Ref]) -> Self:
        """The same delta over other tensors."""
        return replace(self, **{name: fn(ref) for name, ref in self.refs().items()})

    @property
    def parameters(self) -> int:
        return sum(ref.spec.numel for ref in self.refs().values())

    @property
    def nbytes(self) -> int:
        return sum(ref.spec.nbytes for ref in self.refs().values())


def require_floating(*specs: Spec) -> None:
    """Raise UnsupportedError for a tensor whose elements are no plain floating-point numbers, and so cannot be rounded to."""
    for spec in specs:
        if not spec.floating:
            raise UnsupportedError("arithmetic on a dtype that is not a plain floating-point one", found=spec)


class Additive(Delta):
    """A delta that is a difference: W′ = W + ΔW, so that it can be scaled and summed.

    `reproducible` kinds promise the same bits of ΔW on any machine.
    """

    reproducible: ClassVar[bool] = False

    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW."""

    @abstractmethod
    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        """The map rows → scale·ΔW[rows], (rows, columns) in float64."""

    @abstractmethod
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius)."""

    def spec(self, base: Spec | None) -> Spec:
        if base is None:
            raise ShapeError("changes a tensor that the base lacks", expected=f"a weight of shape {list(self.shape())}")
        if not self.fits(base):
            raise ShapeError("does not fit the base's weight", found=list(self.shape()), expected=list(base.shape))
        require_floating(base, *(ref.spec for ref in self.refs().values()))
        return base

    def fits(self, base: Spec) -> bool:
        return self.shape() == base.shape

    def bind(self, base: Spec | None, read: Read, device: str = "cpu") -> Bound:
        assert base is not None
        dense = self.bind_dense(base, 1.0, device)
        narrow: list[Tensor] = []

        def rows(part: slice, W: Tensor | None) -> Tensor:
            assert W is not None
            difference = dense(part)
            if difference.dtype == W.dtype:
                return W.add_(difference)
            if not narrow or narrow[0].shape != W.shape:
                narrow[:] = [W.new_empty(W.shape)]  # kept: a new one for each block costs more than the addition
            return W.add_(narrow[0].copy_(difference))

        return rows

    def affine(self, base: Spec, read: Read, keep: Keep, strength: float = 1.0, device: str = "cpu") -> Affine | None:
        if not self.reproducible:
            return None
        dense = self.bind_dense(base, strength, device)
        return lambda part: (None, dense(part))
