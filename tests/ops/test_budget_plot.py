"""Error against size: the curve's points are what resize gives for that size and for that rank, in bytes and in error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from loratools.formats import load
from loratools.linalg.ranks import Module, budget
from loratools.ops._budget_plot import Curve, Spectrum, curve, draw_curve, plans, powers
from loratools.ops._pictures import _adapter_curve
from loratools.ops.resize import resize
from tests.pictures import adapter, llama, weights


def total(receipt: dict[str, Any]) -> float:
    """The relative error over all modules, of a receipt's rows."""
    return math.sqrt(math.fsum(row["share"] * row["error"] ** 2 for row in receipt["tensors"]))


@pytest.mark.parametrize("dora", [False, True])
def test_the_points_are_what_resize_gives(tmp_path: Path, dora: bool) -> None:
    shapes = llama(3)
    folder = adapter(tmp_path / "adapter", shapes, 8, weights(shapes) if dora else None)
    found = _adapter_curve(load(folder))
    assert found is not None and found.here == (found.best[-1][0], 0.0) and found.label == "as it is"
    for size, error in found.best[::13]:
        receipt = resize(folder, tmp_path / f"{size}", size=size)
        assert file(tmp_path / f"{size}") == size
        assert total(receipt) == pytest.approx(error, rel=1e-5, abs=1e-6)  # factors are stored as float32
    for size, error, rank in found.equal[::3]:
        receipt = resize(folder, tmp_path / f"rank{rank}", rank=rank)
        assert file(tmp_path / f"rank{rank}") == size
        assert total(receipt) == pytest.approx(error, rel=1e-5, abs=1e-6)


def file(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


SIGMA = st.lists(st.floats(0.01, 10), min_size=1, max_size=6).map(lambda values: sorted(values, reverse=True))


@given(st.lists(st.tuples(SIGMA, st.integers(1, 9)), min_size=1, max_size=4))
def test_no_other_ranks_have_a_smaller_error_in_as_many_bytes(modules: list[tuple[list[float], int]]) -> None:
    """At every plan the exact program over all ranks, 1 for all being given, finds no better."""
    spectra = {str(index): Spectrum(sigma, cost, len(sigma), math.fsum(sigma)) for index, (sigma, cost) in enumerate(modules)}
    offered = [Module(sigma2=one.sigma2[1:], bytes_per_rank=one.per_rank) for one in spectra.values()]
    for plan in plans(spectra, 1000):
        best = budget(offered, sum((rank - 1) * spectra[name].per_rank for name, rank in plan.items()))
        gains = [sum(sum(one.sigma2[:rank]) for one, rank in zip(spectra.values(), ranks, strict=True)) for ranks in (
            [1 + extra for extra in best], plan.values())]  # fmt: skip
        assert gains[0] == pytest.approx(gains[1], rel=1e-12)


def test_plans_lead_from_one_to_all_by_about_as_many_steps_as_asked() -> None:
    spectra = {str(index): Spectrum([0.9**i for i in range(64)], 10 + index, 64, 10.0) for index in range(20)}
    found = plans(spectra, 40)
    assert set(found[0].values()) == {1} and set(found[-1].values()) == {64} and 35 <= len(found) <= 41


def test_what_is_not_in_the_spectrum_stays_an_error() -> None:
    found = curve({"q": Spectrum([3.0, 1.0], 5, 2, 6.0)}, lambda plan: 100 + 5 * plan["q"], {"q": 1}, label="x", besides=4.0)
    assert [size for size, _ in found.best] == [105, 110]
    assert [error for _, error in found.best] == pytest.approx([math.sqrt(0.7), math.sqrt(0.6)])
    assert found.here == (105, pytest.approx(math.sqrt(0.7)))


def test_the_panel_draws_these_numbers_with_their_units() -> None:
    ax = Figure().subplots()
    draw_curve(ax, Curve([(1_000_000, 0.5), (3_000_000, 0.0)], [(2_000_000, 0.3, 4)], (3_000_000, 0.0), "as it is"))
    best, equal, here = ax.lines
    np.testing.assert_array_equal(best.get_xydata(), [[1, 50], [3, 0]])  # type: ignore[arg-type]
    np.testing.assert_allclose(equal.get_xydata(), [[2, 30]])  # type: ignore[arg-type]
    assert here.get_label() == "as it is: 3 MB, 0 %" and [text.get_text() for text in ax.texts] == ["4"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("file of weights, MB", "error, % of ‖ΔW‖") and ax.get_xlim()[0] == ax.get_ylim()[0] == 0
    small = Figure().subplots()
    draw_curve(small, Curve([(1000, 0.5)], [(1000, 0.5, 1)], (1000, 0.5), "as it is"))
    assert small.get_xlabel() == "file of weights, kB" and powers(1) == [1]
