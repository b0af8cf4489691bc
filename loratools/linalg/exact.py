"""The product of two factors with the same bits for any blocking, thread count and BLAS kernel: error-free slicing.

Floating-point sums depend on their order, so a matrix product usually differs from one kernel to the next. Here the factors
are cut into slices of few bits, so that each partial sum of a slice's product is an integer below 2**53 times one power of
two: float64 holds it exactly, and every order gives the same bits. Only elementwise additions in a fixed order round.

Ozaki, Ogita, Oishi, Rump: "Error-free transformations of matrix multiplication by using fast routines of matrix
multiplication and its applications", Numerical Algorithms 59, 2012. Derivation: spec/certificate.md, "Exact products".
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.errors import NonFiniteError, OptionError
from loratools.linalg._powers import balanced, exponent, power

_LOWEST = -400  # rows and columns below 2**-400 are rounded to its grid: no product is subnormal, so flush-to-zero is harmless
_HIGHEST = 480  # and none above 2**480 is taken: no product overflows


class ExactProduct:
    """scale · B @ A in float64, any rows of it, bit for bit the same however it is asked for.

    B is (m, r), A is (r, n), of any float dtype, on one device; the rows come as float64 on that device. The error of an
    element is about 2**(1 - (bits + 1) * slices) · r · max|row of scale·B| · max|column of A| after balancing, with bits = 24
    at rank 16: 2**-49 of that product for the default two slices, 2**-24 for one.

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
        self.bits = _bits(B.shape[1], slices)
        left, right = _padded(B.to(torch.float64) * scale, A.to(torch.float64))
        self._width = left.shape[1]
        self._left = torch.cat(_sliced(left, 1, self.bits, slices), dim=1)
        self._right = torch.cat(_sliced(right, 0, self.bits, slices)[::-1], dim=0)

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
        return result


def _bits(rank: int, slices: int) -> int:
    """The most bits β of a slice with every partial sum ≤ 2**53; the longest sum is at most rank·2**2β, 5/4 of it for three slices."""
    terms = max(1, rank if slices < 3 else -(-5 * rank // 4))
    return (53 - (terms - 1).bit_length()) // 2


def _padded(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced factors with a zero component in front.

    That component makes a zero sum +0 in every kernel; else it may be -0 where a kernel starts from its first product.
    """
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        raise NonFiniteError("a factor holds inf or nan")
    B, A = balanced(B, A)
    if B.numel() and A.numel() and max(int(exponent(B, 1).max()), int(exponent(A, 0).max())) > _HIGHEST:
        raise NonFiniteError("a product of the factors overflows")
    return torch.nn.functional.pad(B, (1, 0)), torch.nn.functional.pad(A, (0, 0, 1, 0))


def _sliced(X: Tensor, axis: int, bits: int, slices: int) -> list[Tensor]:
    """X as a sum of slices, each on a grid of its row (axis 1) or column (axis 0): integers up to 2**bits times one power of two."""
    unit = exponent(X, axis).clamp_min(_LOWEST) - bits
    parts = []
    for _ in range(slices):
        part = torch.round(X * power(-unit)) * power(unit)
        parts.append(part)
        X = X - part  # exact: the remainder is at most half a unit and a multiple of X's own last place
        unit = unit - bits
    return parts
