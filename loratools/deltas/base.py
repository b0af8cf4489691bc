"""A delta: a value object that turns a weight W into W′.

Rows are those of W seen as the matrix `delta.matrix(spec)`: the first axis, and all others as columns, unless a kind says
otherwise. Blocks of rows reach a delta in float64; it answers in float64, and the one rounding is the writer's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

from loratools.deltas.terms import term
from loratools.errors import LoratoolsError, ShapeError, UnsupportedError
from loratools.refs import Ref, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.deltas.seeded import Bank

Read: TypeAlias = "Callable[[int], Iterator[tuple[slice, Tensor]]]"  # rows a block -> W's blocks in order
Bound: TypeAlias = "Callable[[slice, Tensor | None], Tensor]"  # may overwrite and return the block it is given
Dense: TypeAlias = "Callable[[slice], Tensor]"  # valid until the next call
Affine: TypeAlias = "Callable[[slice], tuple[Tensor | None, Tensor]]"  # rows -> (a, d); d is valid until the next call
Keep: TypeAlias = "Callable[[Callable[[], Tensor]], Tensor]"  # a vector made now and written down, or one written down before
_BLOCK = 1 << 18  # elements of a block of rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Delta(ABC):
    """The change of one weight; its tensors are `Ref`s, so a delta of a header costs no data."""

    kind: ClassVar[str]
    follows_tie: ClassVar[bool] = False  # whether on an embedding it is also the change of a head that is tied to it

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

    def fits(self, base: Spec) -> bool:
        """Whether a weight of this shape can take it."""
        try:
            self.spec(base)
        except LoratoolsError:
            return False
        return True

    def fitted(self, base: Spec) -> Self:
        """The same delta with what only the weight's shape tells filled in."""
        return self

    @property
    def called(self) -> str:
        """Its kind with an article, as the field calls it: "an OFT", "a LoHa"."""
        return term(self.kind)

    @property
    def beside(self) -> tuple[str, ...]:
        """What else of its module it reads, by the last component of the tensor's name; `supplied` gives it."""
        return ()

    def supplied(self, others: Mapping[str, Ref]) -> Self:
        """The same delta with the base's tensors that `beside` names at hand."""
        return self

    @property
    def draws(self) -> tuple[Bank, tuple[int, ...]] | None:
        """A bank of random numbers that its file lacks, and the (out, in) it takes of it, once fitted; `drawn` gives it the whole."""
        return None

    def drawn(self, bank: Bank) -> Self:
        """The same delta with the bank that `draws` names, as large as all weights of its adapter need it."""
        return self

    def facts(self) -> dict[str, Any]:
        """What a person asks of it: `rank`, `alpha`, `scaling`, as far as its kind has them."""
        return {}

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


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution of kernel 1 as the matrix it is, for files spell it both ways; any other shape as it is.

    >>> squeezed((4, 3, 1, 1)), squeezed((4, 3, 1, 2))
    ((4, 3), (4, 3, 1, 2))
    """
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape


class Additive(Delta):
    """A delta that is a difference: W′ = W + ΔW, so that it can be scaled and summed.

    `reproducible` kinds promise the same bits of ΔW on any machine; `flat` ones tell a convolution's as (out, in·kernel); of
    `factored` ones the norm costs less than a look at ΔW. `indices` names the fields that hold places, not numbers.
    """

    reproducible: ClassVar[bool] = False
    factored: ClassVar[bool] = False
    flat: ClassVar[bool] = False
    indices: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of ΔW."""

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Of a `flat` kind the convolution's kernel, where a factor tells it."""
        return ()

    def unfolded(self) -> tuple[int, ...]:
        """The shape of the weight, as far as the factors tell it: of a `flat` kind (out, in, *kernel)."""
        shape, kernel = self.shape(), self.kernel_shape
        return (shape[0], shape[1] // math.prod(kernel), *kernel) if kernel else shape

    @abstractmethod
    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        """The map rows → scale·ΔW[rows], (rows, columns) in float64."""

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), from its small product where there is one, else from its rows."""
        from loratools.linalg.product import product_norm

        found = self.product()
        if found is not None:
            return product_norm(*found)
        base = Spec("F64", self.shape())
        dense, (rows, columns) = self.bind_dense(base), self.matrix(base)
        step = max(1, _BLOCK // max(1, columns))
        parts = (dense(slice(start, min(start + step, rows))) for start in range(0, rows, step))
        return math.sqrt(math.fsum(float(part.square().sum()) for part in parts))

    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
        """(B, A) in float64 with ΔW.flatten(1) = B @ A, all scaling within; None where no product smaller than ΔW is known."""
        return None

    def spec(self, base: Spec | None) -> Spec:
        if base is None:
            raise ShapeError("changes a tensor that the base lacks", expected=f"a weight of shape {list(self.shape())}")
        if squeezed(self.shape()) != squeezed(base.matrix if self.flat else base.shape):
            raise ShapeError("does not fit the base's weight", found=list(self.shape()), expected=list(base.shape))
        require_floating(base, *(ref.spec for name, ref in self.refs().items() if name not in self.indices))
        return base

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


class Product(Additive):
    """A difference that is a product B·A of small factors: all it has to say is `shape` and `product`."""

    reproducible = True
    factored = True

    @abstractmethod
    def product(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(B, A) in float64 with ΔW.flatten(1) = B @ A, all scaling within."""

    def bind_dense(self, base: Spec, scale: float = 1.0, device: str = "cpu") -> Dense:
        return exact_rows(*self.product(device), base, scale)


def exact_rows(B: Tensor, A: Tensor, base: Spec, scale: float = 1.0) -> Dense:
    """The map rows → scale·(B @ A)[rows], the same bits in any blocks, as exact as `base.dtype`, which is written, can show."""
    from loratools.linalg.exact import ExactProduct

    product = ExactProduct(B, A, scale=scale, slices=3 if base.dtype == "F64" else 2)
    return lambda part: product.rows(part.start, part.stop)
