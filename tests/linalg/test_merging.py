"""Pruning and voting: peft's own functions on the same dense changes, the papers' definitions, and the same bits for any blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from loratools.errors import OptionError
from loratools.linalg.merging import Pruner, at_random, by_magnitude, by_rank, elected, weighted_sum

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
ROUNDING = 1e-14  # a few float64 operations on numbers near 1


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_blocks(prune: Pruner, D: Tensor, rows: int) -> Tensor:
    return torch.cat([prune(D[start : start + rows]) for start in range(0, len(D), rows)])


shapes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@settings(max_examples=60)
@given(shapes, st.sampled_from([0.01, 0.2, 0.5, 0.99, 1.0]), st.integers(0, 999))
def test_magnitude_is_pefts_where_no_two_are_equal(shape: tuple[int, int], density: float, seed: int) -> None:
    D = randn(*shape, seed=seed)
    pruned = by_magnitude(lambda: [D], density, D.numel())(D)
    assert torch.equal(pruned, merge_utils.prune(D, density, "magnitude"))


@pytest.mark.parametrize(
    "D",
    [
        torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]),
        torch.zeros(2, 3),
        torch.tensor([[5e-324, -0.0, 2.0], [1e308, 1.0, 5e-324]]),
        torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]),
    ],
    ids=["equal", "zero", "extreme", "sparse"],
)
def test_of_equal_magnitudes_the_first_stay(D: Tensor) -> None:
    D = D.double()
    for keep in range(1, 7):
        order = sorted(range(6), key=lambda place: (-abs(float(D.flatten()[place])), place))[:keep]
        expected = torch.tensor([float(value) if place in order else 0.0 for place, value in enumerate(D.flatten())]).double().reshape(2, 3)
        for rows in (1, 2):
            prune = by_magnitude(lambda: iter(D.split(rows)), keep / 6 + 1e-9, 6)  # noqa: B023
            assert torch.equal(in_blocks(prune, D, rows), expected)


def test_a_density_that_keeps_less_than_one_keeps_none() -> None:
    D = randn(2, 3)
    assert not by_magnitude(lambda: [D], 0.1, 6)(D).any()


@pytest.mark.parametrize("make", [at_random, lambda density, key: by_rank(density, 0.2, key)])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_what_is_drawn_keeps_the_expectation(make: Callable[[float, bytes], Pruner], density: float) -> None:
    """The mean over many keys is the change itself: that is what the division by the chance is for (DARE, section 3.2)."""
    D, count = randn(4, 5), 4000
    total = torch.zeros_like(D)
    kept = 0
    for index in range(count):
        pruned = make(density, index.to_bytes(16, "little"))(D)
        total += pruned
        kept += int(pruned.count_nonzero())
    # a mean of `count` draws of chance q has a deviation of √((1 − q)/q/count): at most 0.05 for q = 0.1; five of them
    assert float((total / count / D - 1).abs().max()) < 5 * math.sqrt(0.9 / 0.1 / count)
    assert kept / count / 20 == pytest.approx(density, abs=5 * 0.5 / math.sqrt(20 * count))


def test_what_stays_is_divided_by_its_chance() -> None:
    D = randn(3, 100)
    pruned = at_random(0.25, b"k" * 16)(D)
    assert torch.equal(pruned[pruned != 0], (D / 0.25)[pruned != 0])
    assert torch.equal(at_random(1.0, b"k" * 16)(D), D)


def test_chances_rise_with_the_rank_in_the_row() -> None:
    """q = p + ε(2k/(n − 1) − 1): what stays is δ/q, so each kept entry tells its chance."""
    D = torch.tensor([[4.0, -1.0, 3.0, 0.5, -2.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.7, 0.4, 0.6, 0.3, 0.5], [0.3, 0.4, 0.5, 0.6, 0.7]], dtype=torch.float64)
    seen = torch.zeros_like(D)
    for index in range(60):
        pruned = by_rank(0.5, 0.2, index.to_bytes(16, "little"))(D)
        seen = torch.where(pruned != 0, D / pruned, seen)
    assert torch.allclose(seen, expected, atol=ROUNDING)
    assert torch.allclose(by_rank(0.5, 0.2, b"")(torch.ones(9, 1).double()).unique(), torch.tensor([0.0, 2.0]).double())
    assert torch.equal(by_rank(1.0, 0.2, b"")(D), D)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.1), (0.5, 0.6)])
def test_chances_outside_0_to_1_are_refused(density: float, epsilon: float) -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        by_rank(density, epsilon, b"")


@pytest.mark.parametrize(
    "make",
    [
        lambda D: by_magnitude(lambda: iter(D.split(2)), 0.4, D.numel()),
        lambda D: at_random(0.4, b"some key"),
        lambda D: by_rank(0.4, 0.3, b"some key"),
    ],
    ids=["magnitude", "random", "rank"],
)
def test_blocks_do_not_matter(make: Callable[[Tensor], Pruner]) -> None:
    D = randn(13, 7).round(decimals=1)  # with equal magnitudes
    whole = make(D)(D)
    assert 0 < int(whole.count_nonzero()) < D.numel()
    for rows in (1, 2, 5, 13):
        assert torch.equal(in_blocks(make(D), D, rows), whole)
    assert torch.equal(in_blocks(make(D), D.T.contiguous().T, 4), whole)  # nor how the memory lies


def test_another_key_draws_otherwise() -> None:
    D = randn(10, 10)
    assert not torch.equal(at_random(0.5, b"one")(D), at_random(0.5, b"two")(D))


@settings(max_examples=60)
@given(shapes, st.integers(1, 4), st.sampled_from(["total", "frequency"]), st.integers(0, 99), st.booleans())
def test_the_vote_is_pefts(shape: tuple[int, int], count: int, signs: str, seed: int, sparse: bool) -> None:
    parts = [randn(*shape, seed=100 * seed + index) for index in range(count)]
    parts = [torch.where(part.abs() > 0.7, part, 0.0) for part in parts] if sparse else parts
    weights = [0.7, -0.5, 1.0, 2.0][:count]
    stacked, wide = torch.stack(parts), torch.tensor(weights, dtype=torch.float64)
    mask = merge_utils.calculate_majority_sign_mask(stacked, method=signs)
    expected = merge_utils.disjoint_merge(stacked * wide.view(-1, 1, 1), mask)
    assert torch.allclose(elected(parts, weights, signs), expected, atol=ROUNDING)
    assert torch.allclose(weighted_sum(parts, weights), merge_utils.task_arithmetic(parts, wide), atol=ROUNDING)


@pytest.mark.parametrize("signs", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_as_peft_has_it(density: float, signs: str) -> None:
    parts, weights = [randn(6, 8, seed=seed) for seed in range(3)], [1.0, -0.3, 0.6]

    def blocks(D: Tensor) -> Callable[[], Iterable[Tensor]]:
        return lambda: [D]

    found = elected([by_magnitude(blocks(D), density, D.numel())(D) for D in parts], weights, signs)
    assert torch.allclose(found, merge_utils.ties(parts, torch.tensor(weights).double(), density, signs), atol=ROUNDING)
    assert not torch.allclose(found, merge_utils.ties(parts, torch.tensor(weights).double(), density / 2, signs), atol=ROUNDING)
