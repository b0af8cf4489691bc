"""An inverse, and where there is none."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import NonFiniteError, UnsupportedError
from loratools.linalg.solve import inverse


def test_inverse_in_float64() -> None:
    X = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    assert inverse(X).dtype == torch.float64
    assert torch.allclose(inverse(X) @ X.double(), torch.eye(30, dtype=torch.float64), atol=1e-11)


def test_what_cannot_be_inverted() -> None:
    for X in (torch.ones(3, 3), torch.diag(torch.tensor([1.0, 1e-12]))):
        with pytest.raises(UnsupportedError, match="as good as singular"):
            inverse(X)
    with pytest.raises(NonFiniteError, match="inf or nan"):
        inverse(torch.full((2, 2), float("nan")))
