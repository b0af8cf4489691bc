"""One step of a relayout: sizes of parts by their shares, wrappers of biases, halves, and what has no rows to tell."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.loha import LoHa
from loratools.deltas.lowrank import LowRank
from loratools.deltas.scaled import Scaled
from loratools.errors import ShapeError, UnsupportedError
from loratools.layouts.networks import Pair
from loratools.layouts.steps import Step
from loratools.tensors import read_tensor, to_ref
from tests.layouts._adapters import changes, dense, low
from tests.strategies import randn

FUSED = Pair("w", ("q", "k", "m"), (1, 1, 4))
SWAP = Pair("w", ("v",), how="swap")
SPLIT = Step(("w",), FUSED.diffusers, FUSED)


def test_rows_by_shares() -> None:
    whole = low(12)
    made = dict(SPLIT.made({"w": whole}))
    assert [made[name].shape() for name in FUSED.diffusers] == [(2, 4), (2, 4), (8, 4)]  # type: ignore[attr-defined]
    assert all(isinstance(delta, LowRank) and delta.A is whole.A for delta in made.values())
    ((place, again),) = Step(FUSED.diffusers, ("w",), FUSED).made(made)
    assert place == "w" and torch.equal(dense(again), dense(whole))


def test_a_part_that_lacks_is_rows_of_zeros() -> None:
    parts = {"k": low(2), "m": low(8, A=torch.ones(2, 4))}
    ((_, whole),) = Step((None, "k", "m"), ("w",), FUSED).made(parts)
    expected = torch.cat([torch.zeros(2, 4, dtype=torch.float64), dense(parts["k"]), dense(parts["m"])])
    assert torch.allclose(dense(whole), expected, rtol=1e-15, atol=0)  # float64; the zeros of B add nothing


def test_biases_under_a_condition_and_unsettled_weights() -> None:
    bias = changes({"b": torch.ones(12)})["b"]
    made = dict(SPLIT.made({"w": WherePresent(delta=bias)}))
    assert all(isinstance(delta, WherePresent) for delta in made.values())
    rows = [dense(delta.delta) for delta in made.values() if isinstance(delta, WherePresent)]
    assert torch.equal(torch.cat(rows), dense(bias))
    assert all(isinstance(delta, LowRank) for _, delta in SPLIT.made({"w": Unsettled(delta=low(12))}))
    with pytest.raises(UnsupportedError, match="one of all rows"):
        list(SPLIT.made({"w": Unsettled(delta=low(12), transposed=True)}))


def test_factors_of_columns_are_every_parts() -> None:
    columns, rows = Scaled(l=to_ref(randn(4, seed=1)), axis=1), Scaled(l=to_ref(randn(12, seed=1)), axis=0)
    assert all(delta is columns for _, delta in SPLIT.made({"w": columns}))
    lengths = [read_tensor(delta.l).numel() for _, delta in SPLIT.made({"w": rows}) if isinstance(delta, Scaled)]
    assert lengths == [2, 2, 8]
    ((_, kept),) = Step(("w",), ("v",), SWAP).made({"w": columns})
    assert kept is columns


def test_a_loha_is_cut_as_one() -> None:
    loha = LoHa(w1_a=to_ref(randn(12, 2, seed=1)), w1_b=to_ref(randn(2, 4, seed=2)), w2_a=to_ref(randn(12, 2, seed=3)),
                w2_b=to_ref(randn(2, 4, seed=4)), scale=0.5)  # fmt: skip
    made = dict(SPLIT.made({"w": loha}))
    assert all(isinstance(delta, LoHa) for delta in made.values())


@pytest.mark.parametrize("rows", [6, 12])
def test_halves(rows: int) -> None:
    given = low(rows)
    ((place, found),) = Step(("w",), ("v",), SWAP).made({"w": given})
    assert place == "v" and isinstance(found, LowRank) and found.A is given.A and found.alpha == given.alpha
    assert torch.equal(read_tensor(found.B), torch.cat(read_tensor(given.B).chunk(2)[::-1]))


def test_what_has_no_halves_or_shares() -> None:
    with pytest.raises(ShapeError, match="halves change places, and its rows are not even: found 7"):
        list(Step(("w",), ("v",), SWAP).made({"w": low(7)}))
    with pytest.raises(ShapeError, match=r"found 7, expected a multiple of 6 \(1:1:4\)"):
        list(SPLIT.made({"w": low(7)}))
    with pytest.raises(ShapeError, match="found 2, None, 4, expected 1:1:4"):
        list(Step(("q", None, "m"), ("w",), FUSED).made({"q": low(2), "m": low(4)}))
