"""The product of two factors with the same bits for any blocking, thread count and BLAS kernel: error-free slicing.

Floating-point sums depend on their order, so a matrix product usually differs from one kernel to the next. Here the factors
are cut into slices of few bits, so that each partial sum of a slice's product is an integer below 2**53 times one power of
two: float64 holds it exactly, and every order gives the same bits. Only elementwise additions in a fixed order round.

Ozaki, Ogita, Oishi, Rump: "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication and its applications", Numerical Algorithms 59, 2012. Derivation: spec/certificate.md, "Exact products".
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from loratools.errors import NonFiniteError, OptionError
from loratools.linalg._powers import balanced, exponent, power

_LOWEST = -400  # rows and columns below 2**-400 are rounded to its grid: no product is subnormal, so flush-to-zero is harmless
_NORM = 26  # bits of a row's norm in the first slice: (2**26)² is half of 2**53, the rest is room for rounding
_HIGHEST = 480  # and none above 2**480 is taken: no product overflows


class ExactProduct:
    """scale · B @ A in float64, any rows of it, bit for bit the same however it is asked for.

    B is (m, r), A is (r, n), of any float dtype, on one device; the rows come as float64 on that device. A first slice keeps
    a row of scale·B and a column of A, after balancing, to 2⁻²⁶ or 2⁻²⁷ of their norms, so that by Cauchy and Schwarz no
    sum passes 2⁵³; each further slice adds 26 − ⌈log₂√r⌉ bits. The error of an element is about √r · 2⁻²⁶ of the norms'
    product for one slice, √r · 2⁻⁵⁰ at rank 16 for the default two.

    Raises NonFiniteError for factors that hold inf or nan or whose product could overflow, OptionError for shapes and
    slices that do not fit.

    >>> B, A = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    >>> ExactProduct(B, A, scale=0.5).rows(1, 2).tolist()
    [[3.0, 4.0, 5.0]]
    """

    def __init__(self, B: Tensor, A: Tensor, *, scale: float = 1.0, slices: int = 2) -> None:
        if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
            raise OptionError("factors do not fit", found=f"B {tuple(B.shape)}, A {tuple(A.shape)}", expected="B (m, r), A (r, n)")
        if slices not in (1, 2, 3):
            raise OptionError("slices", found=slices, expected="1, 2 or 3")
        self.shape = (B.shape[0], A.shape[1])
        self.slices = slices
        self.bits = _bits(B.shape[1])
        left, right = _checked(B.to(torch.float64) * scale, A.to(torch.float64))
        self._width = left.shape[1]
        self.units = _norm_exponent(left, 1) - _NORM, _norm_exponent(right, 0) - _NORM
        lefts, rights = (_sliced(X, unit, self.bits, slices) for X, unit in zip((left, right), self.units, strict=True))
        # A sum of zero products may be -0 where a kernel starts from its first product: then +0 is added, in all alike.
        # Without a zero in the factors' first slices a sum is zero by cancellation alone, which is +0.
        self._zeros = not (bool(lefts[0].all()) and bool(rights[0].all()))
        self._left, self._right = torch.cat(lefts, dim=1), torch.cat(rights[::-1], dim=0)

    def rows(self, start: int, stop: int, *, out: Tensor | None = None, scratch: Tensor | None = None) -> Tensor:
        """Rows start to stop, (stop - start, n) in float64; `out` receives them, `scratch` (as large) saves an allocation.

        >>> ExactProduct(torch.eye(2), torch.eye(2)).rows(0, 1).tolist()
        [[1.0, 0.0]]
        """
        left, width = self._left[start:stop], self._width
        result = torch.mm(left[:, :width], self._right[(self.slices - 1) * width :], out=out)
        for order in range(2, self.slices + 1):
            factors = left[:, : order * width], self._right[(self.slices - order) * width :]
            # Not addmm: a kernel may start its sums from the first product and so round in an order of its own.
            term = torch.mm(*factors, out=None if scratch is None else scratch[: left.shape[0]])
            result.add_(term)
        return result.add_(0.0) if self._zeros else result


class ExactRight:
    """X @ A in float64 for any rows X, the same bits however the rows come in blocks; A (k, n) is cut once.

    Slices of X keep a row to 2⁻²⁶ of its norm, those of A a column, as in `ExactProduct`, but nothing is balanced: rows of X come
    later. For a W that is multiplied from the right. The error of an element is about √k · 2⁻²⁶⁻ᵇ of the norms' product, b the bits
    of a second slice: 2⁻⁴⁰ at k = 4096 with the default two slices, 2⁻⁵⁰ with three. Several products side by side are one: A
    (count, k, n) takes X (count, m, k).

    Raises NonFiniteError for an A, or later an X, that holds inf or nan.

    >>> ExactRight(torch.tensor([[1.0, 2.0]]))(torch.tensor([[3.0]])).tolist()
    [[3.0, 6.0]]
    """

    def __init__(self, A: Tensor, *, slices: int = 2) -> None:
        if not torch.isfinite(A).all():
            raise NonFiniteError("a factor holds inf or nan")
        self.slices, self.bits, self._width = slices, _bits(A.shape[-2]), A.shape[-2]
        right = A.to(torch.float64)
        rights = _sliced(right, _norm_exponent(right, -2) - _NORM, self.bits, slices)
        self._right = torch.cat(rights[::-1], dim=-2)

    def __call__(self, X: Tensor) -> Tensor:
        """X (m, k) @ A, (m, n) in float64."""
        if not torch.isfinite(X).all():
            raise NonFiniteError("a weight holds inf or nan")
        wide = X.to(torch.float64)
        left = torch.cat(_sliced(wide, _norm_exponent(wide, -1) - _NORM, self.bits, self.slices), dim=-1)
        width = self._width
        result = torch.matmul(left[..., :width], self._right[..., (self.slices - 1) * width :, :])
        for order in range(2, self.slices + 1):
            result.add_(torch.matmul(left[..., : order * width], self._right[..., (self.slices - order) * width :, :]))
        return result.add_(0.0)


def from_left(B: Tensor, blocks: Iterable[tuple[slice, Tensor]], *, slices: int = 2) -> Tensor:
    """B @ X in float64, of an X that comes in blocks of rows: one product a block, added in their order.

    B is (r, m), the blocks together (m, n). The bits depend on where the blocks begin, so a caller always asks for the same.

    >>> halves = [(slice(0, 1), torch.tensor([[3.0]])), (slice(1, 2), torch.tensor([[4.0]]))]
    >>> from_left(torch.tensor([[1.0, 2.0]]), halves).tolist()
    [[11.0]]
    """
    total: Tensor | None = None
    for part, X in blocks:
        term = ExactProduct(B[:, part], X, slices=slices).rows(0, B.shape[0])
        total = term if total is None else total.add_(term)
    if total is None:
        raise OptionError("a product with no rows")
    return total


def _bits(rank: int) -> int:
    """Bits β of a slice after the first: remainders are at most half a unit, so a row of them has norm ≤ √r·2**(β − 1).

    The second order's sums then stay below 2·2**26·√r·2**(β − 1) ≤ 2**52, the third's below that and r·2**(2β − 2) ≤ 2**50.
    """
    return _NORM - (max(1, rank) - 1).bit_length() // 2 - (max(1, rank) - 1).bit_length() % 2


def _checked(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The factors balanced, finite, and too small for any product to overflow."""
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise NonFiniteError("a factor holds inf or nan")
    B, A = balanced(B, A)
    if B.numel() and A.numel() and max(int(exponent(B, 1).max()), int(exponent(A, 0).max())) > _HIGHEST:
        raise NonFiniteError("a product of the factors overflows")
    return B, A


def _norm_exponent(X: Tensor, axis: int) -> Tensor:
    """Per row (axis 1 or -1) or column (axis 0 or -2) an e with norm < 2**e, at most one too large, the same for any order of its entries.

    Entries are rounded up to 20 bits of the largest, so that their squares sum exactly: integers up to 2**52 at rank 4096.
    """
    top = exponent(X, axis).clamp_min(_LOWEST)
    squares = (X.abs() * power(20 - top)).ceil_().square_().sum(axis, keepdim=True)
    return top - 20 + (torch.frexp(squares).exponent.to(torch.int64) + 1) // 2


def _sliced(X: Tensor, unit: Tensor, bits: int, slices: int) -> list[Tensor]:
    """X as a sum of slices, integers times 2**unit, 2**(unit - bits), …, one unit a row or column."""
    parts = []
    for _ in range(slices):
        part = torch.round(X * power(-unit)) * power(unit)
        parts.append(part)
        X = X - part  # exact: the remainder is at most half a unit and a multiple of X's own last place
        unit = unit - bits
    return parts
