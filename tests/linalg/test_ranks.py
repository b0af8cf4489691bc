"""Rank policies on spectra written out, and budgets against every possible choice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import OptionError
from loratools.linalg import ranks
from loratools.linalg.ranks import DENSE, Module, budget, for_energy, for_error

SIGMA = torch.tensor([4.0, 2.0, 2.0, 1.0])  # squares 16, 4, 4, 1: total 25


# Shares of the energy kept: 0.64, 0.80, 0.96, 1
@pytest.mark.parametrize(("fraction", "rank"), [(0.1, 1), (0.64, 1), (0.65, 2), (0.8, 2), (0.95, 3), (0.96, 3), (0.97, 4), (1.0, 4)])
def test_for_energy(fraction: float, rank: int) -> None:
    assert for_energy(SIGMA, 25.0, fraction=fraction) == rank


# Errors left, relative: 0.6, √0.2 = 0.447, 0.2, 0
@pytest.mark.parametrize(("fraction", "rank"), [(0.99, 1), (0.6, 1), (0.59, 2), (0.45, 2), (0.44, 3), (0.2, 3), (0.19, 4), (1e-9, 4)])
def test_for_error(fraction: float, rank: int) -> None:
    assert for_error(SIGMA, 25.0, fraction=fraction) == rank


def test_a_part_of_the_spectrum_that_does_not_reach() -> None:
    assert for_energy(SIGMA[:2], 25.0, fraction=0.9) == 2 and for_error(SIGMA[:2], 25.0, fraction=0.1) == 2


modules = st.builds(
    lambda squares, cost, dense, overhead, limit: Module(
        sigma2=sorted(squares, reverse=True), bytes_per_rank=cost, dense_bytes=dense, overhead=overhead, max_rank=limit
    ),
    st.lists(st.integers(0, 50).map(float), min_size=0, max_size=4),
    st.integers(1, 9),
    st.none() | st.integers(1, 25),
    st.sampled_from([0, 0, 3]),
    st.none() | st.integers(1, 3),
)


def options(module: Module) -> list[tuple[int, float, int]]:
    """Cost, gain and rank of all that may be chosen, from the definition."""
    squares = list(module.sigma2)[: module.max_rank if module.max_rank is not None else None]
    found = [(0, 0.0, 0)]
    found += [(module.overhead + r * module.bytes_per_rank, sum(squares[:r]), r) for r in range(1, len(squares) + 1)]
    return found + ([] if module.dense_bytes is None else [(module.dense_bytes, sum(module.sigma2), DENSE)])


def outcome(spectra: list[Module], chosen: list[int]) -> tuple[int, float]:
    picked = [next(o for o in options(module) if o[2] == rank) for module, rank in zip(spectra, chosen, strict=True)]
    return sum(o[0] for o in picked), sum(o[1] for o in picked)


def best_gain(spectra: list[Module], capacity: int) -> float:
    every = itertools.product(*map(options, spectra))
    return max(sum(o[1] for o in choice) for choice in every if sum(o[0] for o in choice) <= capacity)


@given(st.lists(modules, min_size=1, max_size=4), st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_budget_is_the_best_of_all_choices(spectra: list[Module], capacity: int) -> None:
    cost, gain = outcome(spectra, budget(spectra, capacity))
    assert cost <= capacity
    assert gain == best_gain(spectra, capacity)


@given(st.lists(modules, min_size=1, max_size=4), st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_greedy_loses_less_than_one_step(spectra: list[Module], capacity: int) -> None:
    choices = [ranks._options(module) for module in spectra]
    chosen = [options[index][2] for options, index in zip(choices, ranks._greedy(choices, capacity), strict=True)]
    cost, gain = outcome(spectra, chosen)
    # Relaxed to fractions, the greedy order is optimal, so it loses less than the gain of the step that first did not fit
    step = max(
        (options[b][1] - options[a][1] for options in choices for a, b in itertools.pairwise([0, *ranks._hull(options)])), default=0.0
    )
    assert cost <= capacity and gain >= best_gain(spectra, capacity) - step


def test_many_modules_with_awkward_sizes_go_the_greedy_way() -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = [
        Module(
            sigma2=(torch.rand(1, generator=generator).item() + 0.5) * torch.arange(1, 65).double().numpy() ** -1.4,
            bytes_per_rank=b,
            overhead=97,
        )
        for b in torch.randint(1000, 9999, (150,), generator=generator).tolist()
    ]
    capacity = sum(module.bytes_per_rank for module in spectra) * 8
    chosen = budget(spectra, capacity)
    spent = sum(97 * (r > 0) + r * module.bytes_per_rank for module, r in zip(spectra, chosen, strict=True))
    assert capacity - min(module.bytes_per_rank for module in spectra) < spent <= capacity  # nothing more would have fitted
    uniform = sum(sum(module.sigma2[:7]) for module in spectra)
    assert sum(sum(module.sigma2[:r]) for module, r in zip(spectra, chosen, strict=True)) > uniform


def test_dense_where_factors_cost_more() -> None:
    module = Module(sigma2=[4.0, 3.0, 2.0, 1.0], bytes_per_rank=10, dense_bytes=25)
    assert [budget([module], capacity)[0] for capacity in (9, 10, 24, 25, 1000)] == [0, 1, 2, DENSE, DENSE]


def test_limits() -> None:
    assert budget([], 10) == [] and budget([Module(sigma2=[1.0], bytes_per_rank=4)], 3) == [0]
    assert budget([Module(sigma2=[3.0, 2.0, 1.0], bytes_per_rank=1, max_rank=2)], 100) == [2]
    assert math.isclose(sum(budget([Module(sigma2=[1.0] * 8, bytes_per_rank=3)] * 5, 30)), 10)
    with pytest.raises(OptionError):
        budget([], -1)
