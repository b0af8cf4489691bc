"""A weight's singular components cut in two, and how surely float32 tells them apart."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.errors import NonFiniteError
from loratools.linalg.parts import LIMIT, parts
from tests.strategies import randn


def weight(sigma: list[float], rows: int = 7, columns: int = 5) -> torch.Tensor:
    """A random matrix with these singular values."""
    left, right = (torch.linalg.qr(randn(size, len(sigma), seed=size).double())[0] for size in (rows, columns))
    return (left * torch.tensor(sigma, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5), (1, 4)])
def test_the_parts_add_up(shape: tuple[int, int]) -> None:
    W = randn(*shape, seed=3).double()
    found, size = parts(W), min(shape)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(found.sigma, S, rtol=1e-13)
    for cut in range(size + 1):
        assert torch.allclose(found.between(0, cut) + found.between(cut, size), W, atol=1e-13)
        assert torch.allclose(found.between(0, cut), (U[:, :cut] * S[:cut]) @ Vh[:cut], atol=1e-12)


def test_doubt_grows_as_the_gap_closes() -> None:
    gaps = [1.0, 1e-2, 1e-4, 1e-6]
    found = [parts(weight([3.0, 2.0, 2.0 - gap, 0.5])).doubt(2) for gap in gaps]
    assert found == sorted(found) and found[0] < 1e-6 < LIMIT < found[-1]
    for gap, doubt in zip(gaps, found, strict=True):
        norm = math.sqrt(9 + 4 + (2 - gap) ** 2 + 0.25)
        assert doubt == pytest.approx(4 * math.sqrt(2) * 2.0**-24 * 3 / gap * 2 / norm, rel=1e-6)


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_doubt_bounds_what_float32_does(cut: int) -> None:
    """The same cut made in float32 is no further off than that, with what its own rounding adds."""
    W = weight([5.0, 4.9, 3.0, 2.999, 1.0], 60, 40)
    found = parts(W.float().double())
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    apart = float(((U[:, :cut] * S[:cut]) @ Vh[:cut] - found.between(0, cut)).norm() / W.norm())
    assert apart <= found.doubt(cut) + 1e-6


def test_no_cut_is_no_doubt_and_none_is_sure_between_equals() -> None:
    found = parts(weight([2.0, 1.0, 1.0]))
    assert found.doubt(0) == found.doubt(len(found.sigma)) == 0.0
    assert found.doubt(2) > 1
    nothing = parts(torch.zeros(3, 2, dtype=torch.float64))
    assert nothing.doubt(1) == 0.0 and not bool(nothing.between(0, 2).any())


def test_a_weight_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError):
        parts(torch.tensor([[1.0, float("nan")]], dtype=torch.float64))
