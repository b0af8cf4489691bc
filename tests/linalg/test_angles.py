"""Principal angles: known ones, tiny ones, right ones, and the definition by cosines."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import OptionError
from loratools.linalg.angles import principal_angles


def orthonormal(m: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(m, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize(
    "angles", [[0.0, 1e-12, 1e-6, 0.3], [0.7, 0.8, 1.5, 1.5707963], [0.0, 0.0, 1.5707963267948966, 1.5707963267948966]]
)
def test_known_angles(angles: list[float]) -> None:
    """V turned away from U by exactly these angles, both in bases of their own."""
    wanted = torch.tensor(angles, dtype=torch.float64)
    frame = orthonormal(30, 8, 0)
    U, W = frame[:, :4], frame[:, 4:]
    V = U * wanted.cos() + W * wanted.sin()
    found = principal_angles(U @ orthonormal(4, 4, 1), V @ orthonormal(4, 4, 2))
    # a few units of float64; equal and nearly equal cosines mix their directions, which moves an angle by √(1e-16 of their gap)
    assert torch.allclose(found, wanted, atol=2e-8 if angles[1] == 1e-12 else 1e-14, rtol=1e-7)
    assert float(found[0]) == pytest.approx(angles[0], abs=2e-8)


def test_cosines_are_singular_values() -> None:
    U, V = orthonormal(20, 3, 0), orthonormal(20, 5, 1)
    cosines = torch.linalg.svdvals(U.T @ V)
    assert torch.allclose(principal_angles(U, V).cos(), cosines, atol=1e-14)
    assert torch.allclose(principal_angles(V, U), principal_angles(U, V), atol=1e-12)


def test_a_space_and_itself() -> None:
    U = orthonormal(20, 5, 0)
    assert float(principal_angles(U, U @ orthonormal(5, 5, 1)).max()) < 1e-14
    assert principal_angles(U, U[:, :0]).numel() == 0


def test_faults() -> None:
    with pytest.raises(OptionError):
        principal_angles(torch.ones(3, 1), torch.ones(4, 1))
