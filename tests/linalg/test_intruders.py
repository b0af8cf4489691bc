"""Intruder dimensions and energies: by construction, by the definition in dense float64, and where nothing changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loratools.errors import NonFiniteError
from loratools.linalg.intruders import Directions


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (8, 8)])
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_it_is_the_definition(shape: tuple[int, int], top_k: int) -> None:
    W, D = randn(*shape), randn(shape[0], 2, seed=1) @ randn(2, shape[1], seed=2)
    found = Directions(W.float()).against(D, top_k)
    k = min(top_k, *shape)
    U, _, Vh = torch.linalg.svd(W.float().double(), full_matrices=False)
    tuned = torch.linalg.svd(W.float().double() + D, full_matrices=False)[0]
    cosines = [max(abs(float(tuned[:, j] @ U[:, i])) for i in range(min(shape))) for j in range(k)]
    assert found.cosines.tolist() == pytest.approx(cosines, abs=1e-12)
    assert found.norm == pytest.approx(float(D.norm()))
    assert found.left == pytest.approx(float((U[:, :k].T @ D).norm() ** 2 / D.norm() ** 2), abs=1e-12)
    assert found.right == pytest.approx(float((D @ Vh[:k].T).norm() ** 2 / D.norm() ** 2), abs=1e-12)


def test_a_large_change_across_all_of_the_weights_directions_is_an_intruder() -> None:
    """W of 16 left singular vectors; a change along their mean has a cosine of 1/4 with each and leads W′."""
    W = torch.diag(torch.linspace(1, 2, 16, dtype=torch.float64))
    u, v = torch.full((16, 1), 0.25, dtype=torch.float64), randn(16, 1)
    found = Directions(W).against(1000 * u @ v.T, 5)
    assert float(found.cosines[0]) == pytest.approx(0.25, abs=1e-2)
    assert found.left == pytest.approx(5 / 16)


def test_a_change_within_the_leading_directions_brings_none() -> None:
    W = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    D = torch.zeros(4, 4)
    D[0, 0], D[1, 1] = 1.0, 0.5
    found = Directions(W).against(D, 2)
    assert found.cosines.tolist() == pytest.approx([1, 1]) and (found.left, found.right) == (1.0, 1.0)


def test_no_change() -> None:
    found = Directions(randn(5, 4)).against(torch.zeros(5, 4), 10)
    assert (found.left, found.right, found.norm) == (None, None, 0.0)
    assert found.cosines.tolist() == pytest.approx([1] * 4)


def test_what_is_not_finite_is_named() -> None:
    with pytest.raises(NonFiniteError, match="the weight holds inf or nan"):
        Directions(torch.full((2, 2), math.nan))
    with pytest.raises(NonFiniteError):
        Directions(torch.eye(2)).against(torch.full((2, 2), math.inf), 1)
