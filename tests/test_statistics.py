"""statistics: what a meter makes of blocks is what the whole tensors say, and rows say null where there is nothing to share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loratools.statistics import EVERY, PROBE, Meter, Statistics, square
from tests.strategies import randn

ROWS, COLUMNS = 40, 6


def measured(W: Tensor, new: Tensor, out: Tensor, rows: int, *, full: bool, whole: bool) -> Statistics:
    """Statistics filled block by block; W is overwritten between, as a merge does."""
    statistics = Statistics(kinds=("lora",), full=full, total=W.numel())
    meter = Meter(statistics, whole=whole)
    for index, start in enumerate(range(0, len(W), rows)):
        part = slice(start, start + rows)
        block = W[part].clone()
        meter.before(block, index)
        block.zero_()
        meter.after(new[part].clone(), out[part].clone())
    return statistics


@pytest.mark.parametrize("rows", [1, 7, ROWS])
def test_a_full_measure_is_that_of_the_whole_tensors(rows: int) -> None:
    W, change = randn(ROWS, COLUMNS, seed=0).double(), randn(ROWS, COLUMNS, seed=1).double() * 1e-3
    out = (W + change).bfloat16()
    row = measured(W, W + change, out, rows, full=True, whole=True).row("x")
    assert row["name"] == "x" and row["kind"] == "lora" and row["sampled"] == 1.0
    assert row["relative_norm"] == pytest.approx(float(change.norm() / W.norm()), rel=1e-9)
    assert row["survived"] == pytest.approx(1 - float((out.double() - W - change).norm() / change.norm()), rel=1e-9)
    assert row["unchanged"] == float((out.double() == W).double().mean())


def test_else_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of one block in so many; ‖W‖ is always of all, the change only where nobody tells it."""
    monkeypatch.setattr("loratools.statistics.PROBE", 2 * COLUMNS)
    W, change = randn(ROWS, COLUMNS, seed=0).double(), randn(ROWS, COLUMNS, seed=1).double()
    looked = [row for row in range(ROWS) if row // 5 % EVERY == 0 and row % 5 < 2]
    for whole in (True, False):
        found = measured(W, W + change, (W + change).float(), 5, full=False, whole=whole)
        assert found.sampled == len(looked) * COLUMNS and found.base == pytest.approx(square(W))
        assert found.sampled_change == pytest.approx(square(change[looked]))
        assert found.change == (pytest.approx(square(change)) if whole else None)
    assert PROBE > 2 * COLUMNS


def test_a_tensor_that_is_new_has_nothing_to_compare() -> None:
    statistics = Statistics(kinds=("replacement",), total=6)
    meter = Meter(statistics, whole=True)
    meter.before(None, 0)
    meter.after(torch.ones(2, 3), torch.ones(2, 3))
    row = statistics.row("new")
    assert (row["relative_norm"], row["survived"], row["unchanged"], row["sampled"]) == (None, None, None, 0.0)
    assert Statistics(kinds=()).row("empty")["kind"] == "copy" and Statistics(kinds=()).row("empty")["sampled"] == 1.0


def test_no_change_at_all_has_no_share_that_survived() -> None:
    W = randn(4, 3, seed=0).double()
    row = measured(W, W, W.bfloat16().double(), 4, full=True, whole=True).row("x")
    assert row["relative_norm"] == 0.0 and row["survived"] is None


def test_squares_are_summed() -> None:
    assert square(torch.tensor([[3.0, 4.0]])) == 25.0 and math.isinf(square(torch.tensor([1e30])))
