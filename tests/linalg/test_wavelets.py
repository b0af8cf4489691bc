"""Wavelets: the tables are peft's, and orthogonal but for one; a step of the inverse transform."""

from __future__ import annotations

import math

import pytest
import torch
from peft.tuners.waveft.wavelet import Wavelet, wavelist

from loratools.errors import OptionError
from loratools.linalg.wavelets import combined, filters, names
from tests.strategies import randn


def test_the_tables_are_pefts() -> None:
    assert set(names()) == set(wavelist()) - {"haar", "coif5"}  # another name of db1; one whose table and size there disagree
    for name in names():
        low, high = filters(name)
        assert low == tuple(Wavelet(name).rec_lo) and high == tuple(Wavelet(name).rec_hi)


@pytest.mark.parametrize("name", names())
def test_shifts_by_two_are_orthogonal(name: str) -> None:
    low, high = filters(name)
    bound = 3e-2 if name == "coif4" else 1e-10  # peft's table of coif4 is off by 2 or 3 %
    for shift in range(0, len(low), 2):
        for one, other, expected in ((low, low, shift == 0), (high, high, shift == 0), (low, high, False)):
            found = math.fsum(x * y for x, y in zip(one[shift:], other, strict=False))
            assert abs(found - expected) <= bound, shift
    assert math.fsum(low) == pytest.approx(math.sqrt(2), rel=3e-2 if name == "coif4" else 1e-10)


def test_combined_is_a_transposed_convolution() -> None:
    X, Y, (low, high) = randn(5, 3, seed=0).double(), randn(5, 3, seed=1).double(), filters("sym4")
    both = torch.stack([X.T, Y.T], dim=1)  # (columns, halves, rows)
    kernel = torch.tensor([low, high], dtype=torch.float64).unsqueeze(1)
    expected = torch.nn.functional.conv_transpose1d(both, kernel, stride=2).squeeze(1).T
    found = combined(((X, low), (Y, high)), 2, 9)
    assert torch.allclose(found, expected[2:11], rtol=1e-14, atol=1e-14)
    assert torch.equal(combined(((X, low), (Y, high)), 4, 3), found[2:5])


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(OptionError, match="unknown wavelet: found haar, expected db1 to db10, sym2 to sym10 or coif1 to coif4"):
        filters("haar")
