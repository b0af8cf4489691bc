"""Turning: how numbers become rotations, against LAPACK's solver and a power series in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.deltas.rotated import Rotated
from loratools.deltas.turn import triangle
from loratools.errors import NonFiniteError, OptionError, ShapeError
from loratools.tensors import to_ref
from tests.strategies import randn


def square(numbers: Tensor, size: int) -> Tensor:
    """The skew-symmetric blocks of numbers above a diagonal, element by element."""
    Q = torch.zeros(len(numbers), size, size, dtype=torch.float64)
    places = [(row, column) for row in range(size) for column in range(row + 1, size)]
    for place, (row, column) in enumerate(places):
        Q[:, row, column], Q[:, column, row] = numbers[:, place].double(), -numbers[:, place].double()
    return Q


@pytest.mark.parametrize(("count", "size", "strength"), [(3, 1, 1.0), (3, 2, 1.0), (4, 7, 0.3), (2, 40, 0.5), (1, 70, 3.0)])
def test_cayley_is_the_solvers(count: int, size: int, strength: float) -> None:
    numbers = strength * randn(count, size * (size - 1) // 2, seed=size)
    Q, eye = square(numbers, size), torch.eye(size, dtype=torch.float64)
    found = Rotated(numbers=to_ref(numbers)).rotations()
    assert torch.allclose(found, torch.linalg.solve(eye - Q, eye + Q, left=False), rtol=0, atol=1e-12)
    assert torch.allclose(found @ found.transpose(1, 2), eye.expand_as(found), rtol=0, atol=1e-12)
    other = Rotated(numbers=to_ref(numbers), factor=-1.0).rotations()
    assert torch.allclose(other, found.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("degree", "last"), [(0, 2.0), (1, 2.0), (2, 1.0), (4, 1.0), (4, 2.0)])
def test_the_first_terms_of_its_series(degree: int, last: float) -> None:
    numbers = 0.2 * randn(3, 15, seed=1)
    Q, expected = square(numbers, 6), torch.eye(6, dtype=torch.float64).repeat(3, 1, 1)
    for power in range(1, degree + 1):
        expected = expected + (last if power == degree else 2.0) * torch.matrix_power(Q, power)
    assert torch.allclose(Rotated(numbers=to_ref(numbers), degree=degree, last=last).rotations(), expected, rtol=1e-13, atol=1e-14)


def test_a_square_gives_what_its_two_halves_differ_by() -> None:
    X, eye = randn(2, 3, 5, 5, seed=2), torch.eye(5, dtype=torch.float64)
    found = Rotated(numbers=to_ref(X), factor=0.5)
    Q = (0.5 * (X - X.transpose(2, 3)).double()).reshape(6, 5, 5)
    assert found.blocks() == (6, 5) and found.extent() == 30
    assert torch.allclose(found.rotations(), torch.linalg.solve(eye - Q, eye + Q, left=False), rtol=0, atol=1e-6)  # X − Xᵀ is of float32


@pytest.mark.parametrize("together", [False, True])
def test_a_bound_holds_for_each_block_or_for_all(together: bool) -> None:
    numbers = torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.0, 0.4]])
    Q, eye = square(numbers, 3), torch.eye(3, dtype=torch.float64)
    norms = Q.norm() if together else Q.norm(dim=(1, 2), keepdim=True)
    Q = Q * (1.0 / (norms + 0.01)).clamp(max=1)
    found = Rotated(numbers=to_ref(numbers), bound=1.0, together=together, floor=0.01).rotations()
    assert torch.allclose(found, torch.linalg.solve(eye - Q, eye + Q, left=False), rtol=0, atol=1e-12)
    assert float(Q[1].norm()) == pytest.approx(0.5 * 2**0.5 if not together else 0.0989, rel=1e-2)  # below it a block stays as it is


def test_how_many_threads_there_are_does_not_matter() -> None:
    delta, before = Rotated(numbers=to_ref(0.1 * randn(2, 90 * 89 // 2, seed=3))), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = delta.rotations()
        torch.set_num_threads(2)
        assert torch.equal(one, delta.rotations())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (6,), (2, 2, 2, 2, 2), (0, 6), (0, 2, 2)])
def test_numbers_that_make_no_blocks(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="makes no square blocks"):
        Rotated(numbers=to_ref(torch.ones(shape)))


def test_faults() -> None:
    assert [triangle(count) for count in range(7)] == [1, 2, None, 3, None, None, 4]
    with pytest.raises(OptionError, match="found up, expected in or out"):
        Rotated(numbers=to_ref(torch.ones(1, 1)), side="up")
    with pytest.raises(NonFiniteError, match="numbers of a rotation hold inf or nan"):
        Rotated(numbers=to_ref(torch.tensor([[float("inf")]]))).rotations()
