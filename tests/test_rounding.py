"""Rounding: float64 to nearest, ties to even, in every narrower dtype, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from loratools.rounding import Rounding, _to_odd

NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def rounded(values: list[float] | np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.tensor(np.asarray(values), dtype=torch.float64)
    out = torch.empty(len(wide), dtype=dtype)
    Rounding()(wide, out)
    return out


def neighbours(value: float, dtype: torch.dtype) -> list[Fraction]:
    """Values of the dtype around a float64, each end of the interval included."""
    near = torch.tensor([value], dtype=torch.float64).to(dtype)
    code = {1: torch.uint8, 2: torch.int16}[near.element_size()]
    shifts = [near.view(code) + shift for shift in (-1, 0, 1)]
    found = [shift.view(dtype).to(torch.float64).item() for shift in shifts]
    return [Fraction(x) for x in found if math.isfinite(x)]


@given(st.floats(-400, 400, allow_nan=False), st.sampled_from(NARROW))
def test_nearest(value: float, dtype: torch.dtype) -> None:
    assume(dtype != torch.bfloat16 or value == 0 or abs(value) >= 2.0**-126)  # below, it is rounded twice, as rounding.py says
    found = Fraction(rounded([value], dtype).to(torch.float64).item())
    assert abs(found - Fraction(value)) == min(abs(x - Fraction(value)) for x in neighbours(value, dtype))


@given(st.integers(128, 255), st.integers(-20, 4), st.sampled_from([-1, 0, 1]), st.integers(30, 44), st.booleans())
def test_beside_and_on_the_ties_of_bfloat16(significand: int, exponent: int, side: int, far: int, negative: bool) -> None:
    """On a tie the even one, beside it the nearer one, however near: float32 in between would not see the side."""
    tie = Fraction(2 * significand + 1, 2) * Fraction(2) ** exponent
    value = tie + side * Fraction(2) ** (exponent - far)
    even = significand + significand % 2
    expected = Fraction({-1: significand, 0: even, 1: significand + 1}[side]) * Fraction(2) ** exponent
    sign = -1 if negative else 1
    assert Fraction(float(value)) == value
    assert rounded([sign * float(value)], torch.bfloat16).item() == sign * expected


def test_float16_as_numpy_rounds_it_in_one_step() -> None:
    """numpy converts float64 to float16 directly; normal, subnormal, tie and overflowing values."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(200_000) * 10.0 ** generator.integers(-9, 5, 200_000)
    ties = (generator.integers(1024, 2047, 5000) + 0.5) * 2.0**-14 * (1 + generator.choice([-1, 0, 1], 5000) * 2.0**-45)
    values = np.concatenate(
        [values, ties, [65519.99999, 65520.0, 1e9, -1e300, np.inf, -np.inf, 0.0, -0.0, 2.0**-25, 2.0**-25 * (1 + 2**-40)]]
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    found = rounded(values, torch.float16).numpy()
    assert found.view(np.uint16).tolist() == expected.view(np.uint16).tolist()
    assert (torch.from_numpy(values).to(torch.float16).numpy() != expected).sum() > 100  # torch alone would fail this test


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    found = rounded([math.nan, 0.0, -0.0, 1.0, 1e308], dtype)
    assert math.isnan(found[0].item())
    assert torch.signbit(found.to(torch.float64))[1:3].tolist() == [False, True]
    assert found[3].item() == 1.0 and not found[4].item() < 400


def test_wider_and_integer_targets_are_plain_copies() -> None:
    values = [0.1, 2.5, -3.0]
    assert rounded(values, torch.float64).tolist() == values
    assert rounded(values, torch.float32).tolist() == torch.tensor(values).tolist()
    assert rounded([7.0, -2.0], torch.int64).tolist() == [7, -2]


def test_one_object_rounds_blocks_of_any_size_and_stride() -> None:
    rounding, X = Rounding(), torch.randn(40, 30, dtype=torch.float64)
    for rows in (7, 40, 1):
        out = torch.empty(30, rows, dtype=torch.bfloat16)
        rounding(X[:rows].T, out)
        again = torch.empty_like(out)
        Rounding()(X[:rows].T.contiguous(), again)
        assert torch.equal(out, again)


def test_the_device_route_is_the_same_function() -> None:
    X = torch.randn(100_000, dtype=torch.float64) * torch.tensor(10.0, dtype=torch.float64).pow(torch.randint(-9, 4, (100_000,)))
    for dtype in NARROW:
        assert torch.equal(_to_odd(X).to(dtype).view(torch.uint8), rounded(X.numpy(), dtype).view(torch.uint8))
