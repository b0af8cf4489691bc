"""combine by methods that prune: peft's functions on the dense float64 changes, truncated as well as can be, the same for any threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import MatchError, NonFiniteError, OptionError
from loratools.formats import load
from loratools.linalg.merging import at_random, by_rank
from loratools.ops._dense_sum import key_of
from loratools.ops.combine import combine
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.ops._lora import SHAPES, adapters, checked, dense, low, rows_of

NAME = "h.0.up.weight"
FULL = 1000  # a rank that no matrix here has: nothing is truncated
FLOAT32 = 2e-7  # of ‖D‖: factors of full rank rounded to float32, 2⁻²⁴ for each and some for sums of few
Pairs = Sequence[tuple[Adapter, float]]
pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0 is greater")


def changes(given: Pairs, name: str) -> tuple[list[Tensor], list[float], list[int]]:
    """The dense changes of a tensor, their weights, and the adapters' places."""
    held = [(index, one, weight) for index, (one, weight) in enumerate(given) if name in one]
    return [dense(one[name]) for _, one, _ in held], [weight for _, _, weight in held], [index for index, _, _ in held]


def oracle(given: Pairs, name: str, method: str, *, density: float, seed: int = 0, majority_sign: str = "total") -> Tensor:
    """peft's function on the dense changes; what is drawn is drawn by the tensor's key."""
    parts, listed, places = changes(given, name)
    weights = torch.tensor(listed, dtype=torch.float64)
    if method == "magnitude-prune":
        return merge_utils.magnitude_prune(parts, weights, density)
    if method == "ties":
        return merge_utils.ties(parts, weights, density, majority_sign)
    keys = [key_of(seed, f"{place}:{name}") for place in places]
    prune = [by_rank(density, 0.15, key) if method == "della" else at_random(density, key) for key in keys]
    drawn = torch.stack([one(part) for one, part in zip(prune, parts, strict=True)])
    weighted = drawn * weights.view(-1, 1, 1)
    if method == "dare-linear":
        return weighted.sum(0)
    return merge_utils.disjoint_merge(weighted, merge_utils.calculate_majority_sign_mask(drawn, method=majority_sign))


METHODS = ("ties", "magnitude-prune", "dare-linear", "dare-ties", "della")


@settings(max_examples=60)
@given(
    st.lists(st.tuples(adapters(), st.sampled_from([1.0, 0.7, -0.5])), min_size=1, max_size=3), st.sampled_from(METHODS),
    st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([1, 4, FULL]), st.sampled_from(["total", "frequency"]),
)  # fmt: skip
def test_it_is_pefts_function_of_the_dense_changes(
    tmp_path_factory: pytest.TempPathFactory, given: Pairs, method: str, density: float, rank: int, signs: str
) -> None:
    out = tmp_path_factory.mktemp("m") / "out"
    words: dict[str, Any] = {"majority_sign": signs} if method in ("ties", "dare-ties", "della") else {}
    receipt = checked(combine(given, out, method=method, density=density, rank=rank, **words), out)
    found = load(out)
    assert set(found) == {name for one, _ in given for name in one}
    assert receipt["applied"] == receipt["expected"] == sum(len(one) for one, _ in given)
    for name, row in rows_of(receipt).items():
        wanted = oracle(given, name, method, density=density, **words)
        norm, error = float(wanted.norm()), float((dense(found[name]) - wanted).norm())
        best = float(torch.linalg.svdvals(wanted)[rank:].norm())
        # entries whose sum of three cancels may get the other sign, and with it another value as small as float64's rounding
        noise = 1e-13 * sum(float(part.norm()) for part in changes(given, name)[0]) / density
        assert row["rank"] == min(rank, *wanted.shape)
        assert error <= (1 + 1e-4) * best + FLOAT32 * norm + noise
        assert row["error"] * norm == pytest.approx(error, rel=1e-4, abs=1e-10 * norm + noise)
        assert row["optimal_error"] * norm <= best * (1 + 1e-9) + noise
        assert row["optimal_error"] * norm >= best / (1 + 1e-4) - 1e-6 * norm - noise


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", ["degenerate", "zero", "badly scaled", "steep"])
def test_hard_spectra_in_full(tmp_path: Path, method: str, spectrum: str) -> None:
    """Factors of A ~ 1e-2 and B ~ 1e-6 and a condition of 1e6, equal singular values, nothing at all: nothing is lost at full rank."""
    deltas: list[dict[str, Delta]] = [
        {name: low(shape, 5, seed, layer=layer, spectrum=spectrum) for name, (shape, layer) in SHAPES.items()} for seed in (0, 1)
    ]
    given = [(Adapter(deltas=one), weight) for one, weight in zip(deltas, (0.8, -1.5), strict=True)]
    receipt = combine(given, tmp_path / "out", method=method, density=0.5, rank=FULL)
    found = load(tmp_path / "out")
    for name, row in rows_of(receipt).items():
        wanted = oracle(given, name, method, density=0.5)
        assert float((dense(found[name]) - wanted).norm()) <= FLOAT32 * float(wanted.norm()) and row["error"] <= FLOAT32


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bytes_for_any_threads_and_order(tmp_path: Path, method: str) -> None:
    names = list(SHAPES)
    one, other = ({name: low(SHAPES[name][0], 4, seed, layer=SHAPES[name][1]) for name in names} for seed in (0, 1))
    turned = Adapter(deltas={name: other[name] for name in reversed(names)})
    digests = []
    for index, (second, threads) in enumerate(((Adapter(deltas=dict(other)), 1), (turned, 3))):
        words: dict[str, Any] = {"method": method, "density": 0.5, "rank": 3, "threads": threads}
        receipt = combine([Adapter(deltas=dict(one)), (second, -0.5)], tmp_path / f"out{index}", **words)
        digests.append(receipt["digests"])
    assert digests[0] == digests[1]
    if method in ("dare-linear", "dare-ties", "della"):
        again = combine([Adapter(deltas=dict(one)), (turned, -0.5)], tmp_path / "seed", seed=1, **words)
        assert again["digests"] != digests[0] and again["arguments"]["seed"] == 1


def test_another_adapter_and_another_module_draw_otherwise(tmp_path: Path) -> None:
    ones = Full(diff=to_ref(torch.ones(1, 400)))
    given = Adapter(deltas={"a.bias": ones, "b.bias": ones, "a.weight": low((3, 4), 1, 0), "b.weight": low((3, 4), 1, 1)})
    from loratools.ops._combine_options import checked as options_of
    from loratools.ops._dense_sum import whole

    words = dict.fromkeys(("energy", "max_error", "majority_sign", "epsilon", "dtype"))
    options = options_of({**words, "method": "dare-linear", "rank": 1, "density": 0.5, "seed": 3})
    spec = Spec("F32", (1, 400))
    drawn = [whole(name, [(given[name], 1.0, place)], spec, None, options) for name in ("a.bias", "b.bias") for place in (0, 1)]
    assert len({tuple(part.flatten().tolist()) for part in drawn}) == 4


def with_bias(seed: int, rank: int = 3) -> Adapter:
    weight = low((20, 7), rank, seed, alpha=3.0 + seed)
    bias = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    return Adapter(deltas={NAME: weight, "h.0.up.bias": Full(diff=to_ref(bias), scale=weight.scaling)})


@pytest.mark.parametrize("method", METHODS)
def test_biases_are_pruned_alike(tmp_path: Path, method: str) -> None:
    """A difference of a bias is one row, pruned, voted on, and stored whole under its module's scaling."""
    given = [(with_bias(0), 1.0), (with_bias(1), -0.5)]
    receipt = checked(combine(given, tmp_path / "out", method=method, density=0.5, rank=2), tmp_path / "out")
    found = load(tmp_path / "out")["h.0.up.bias"]
    assert isinstance(found, Full)
    flat = [(Adapter(deltas={"h.0.up.bias": Full(diff=to_ref(dense(one["h.0.up.bias"])[None]))}), weight) for one, weight in given]
    wanted = oracle(flat, "h.0.up.bias", method, density=0.5)[0]
    assert torch.allclose(dense(found), wanted, atol=1e-6 * float(wanted.abs().max()))
    row = rows_of(receipt)["h.0.up.bias"]
    assert row["rank"] is None and row["error"] < 1e-7 and row["adapters"] == 2


def test_saved_tensors_as_in_a_sum(tmp_path: Path) -> None:
    def saving(value: float) -> Adapter:
        return Adapter(deltas={NAME: low((20, 7), 3, 0), "head.weight": Replacement(value=to_ref(torch.full((4, 7), value)))})

    words: dict[str, Any] = {"method": "ties", "density": 0.5, "rank": 2}
    combine([saving(1), saving(1)], tmp_path / "out", **words)
    kept = load(tmp_path / "out")["head.weight"]
    assert isinstance(kept, Replacement) and bool((read_tensor(kept.value) == 1).all())
    with pytest.raises(MatchError, match=r"head\.weight: several adapters save this tensor whole"):
        combine([saving(1), saving(2)], tmp_path / "other", **words)


@pytest.mark.parametrize("rule", [{"energy": 0.95}, {"max_error": 0.2}])
def test_the_least_rank_within_an_error(tmp_path: Path, rule: dict[str, float]) -> None:
    given = [(with_bias(0), 1.0), (with_bias(1), 1.0)]
    row = rows_of(combine(given, tmp_path / "out", method="ties", density=0.3, **rule))[NAME]
    limit = rule.get("max_error", math.sqrt(0.05))
    sigma = torch.linalg.svdvals(oracle(given, NAME, "ties", density=0.3))
    tails = [float(sigma[rank:].norm() / sigma.norm()) for rank in range(len(sigma) + 1)]
    assert row["rank"] == next(rank for rank, tail in enumerate(tails) if tail <= limit) and row["error"] <= limit


def test_a_large_module_is_held_in_float32(tmp_path: Path) -> None:
    """Beyond 2²⁰ elements: the error and the certificate are those of the float64 oracle, and blocks are many."""
    given = [(Adapter(deltas={NAME: low((1100, 1000), 8, seed)}), weight) for seed, weight in ((0, 1.0), (1, 0.5))]
    row = rows_of(combine(given, tmp_path / "out", method="ties", density=0.2, rank=8))[NAME]
    wanted = oracle(given, NAME, "ties", density=0.2)
    error = float((dense(load(tmp_path / "out")[NAME]) - wanted).norm() / wanted.norm())
    best = float(torch.linalg.svdvals(wanted)[8:].norm() / wanted.norm())
    assert row["error"] == pytest.approx(error, rel=1e-6)
    assert row["optimal_error"] <= best <= error <= (1 + 1e-4) * row["optimal_error"]


def test_faults_name_file_and_tensor(tmp_path: Path) -> None:
    words: dict[str, Any] = {"method": "magnitude-prune", "density": 0.5}
    bad = low((20, 7), 3, 0)
    bad = LowRank(A=to_ref(torch.full((3, 7), math.inf)), B=bad.B, alpha=1.0)
    with pytest.raises(NonFiniteError, match=r"h\.0\.up\.weight: a factor holds inf or nan"):
        combine([Adapter(deltas={NAME: bad})], tmp_path / "out", rank=2, **words)
    huge = Full(diff=to_ref(torch.full((20, 7), 1e300, dtype=torch.float64)))
    with pytest.raises(NonFiniteError, match="a change of it is not finite"):
        combine([Adapter(deltas={NAME: huge}), Adapter(deltas={NAME: low((20, 7), 3, 0)})], tmp_path / "out", rank=2, **words)
    with pytest.raises(OptionError, match="no rank of factors in this dtype stays within"):
        combine([(with_bias(0), 1.0)], tmp_path / "out", max_error=1e-4, dtype="bfloat16", **words)
    assert not (tmp_path / "out").exists()
