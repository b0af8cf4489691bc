"""The panel of spectra: groups, one line for each module with the values it was given, medians, and what a logarithm cannot show."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from loratools.ops._spectra_plot import FEW, GROUPS, OTHERS, draw_spectra, groups, medians, shown


def spectra(layers: int, modules: int, rank: int = 12) -> dict[str, list[float]]:
    falling = [0.8**i for i in range(rank)]
    names = [(f"h.{layer}.m{module}.weight", module + 1) for layer in range(layers) for module in range(modules)]
    return {name: [size * value for value in falling] for name, size in names}


def test_a_line_for_each_module_in_its_groups_colour() -> None:
    ax = Figure().subplots()
    draw_spectra(ax, spectra(3, 2))
    first, second = (found for found in ax.collections if isinstance(found, LineCollection))
    assert [len(found.get_segments()) for found in (first, second)] == [3, 3]
    np.testing.assert_array_equal(np.asarray(second.get_segments()[2]), [(i + 1, 2 * 0.8**i) for i in range(12)])
    assert not np.array_equal(first.get_colors(), second.get_colors())
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["m0 (3)", "m1 (3)"]
    assert ax.get_yscale() == "log" and ax.get_xlim() == (1, 12)
    low, high = ax.get_ylim()
    assert low < 0.8**11 and high > 2 and (ax.get_xlabel(), ax.get_ylabel()) == ("index i", "singular value σᵢ")


def test_of_many_modules_the_medians_are_drawn_thick() -> None:
    ax = Figure().subplots()
    draw_spectra(ax, spectra(40, 10))
    assert len(ax.lines) == 10 and "median" in ax.get_title(loc="left") and FEW < 40 * 10
    np.testing.assert_allclose(ax.lines[4].get_ydata(), [5 * 0.8**i for i in range(12)])  # type: ignore[arg-type]


def test_too_many_groups_put_the_smallest_together() -> None:
    names = {f"h.{layer}.m{module}.weight": 0 for module in range(GROUPS + 5) for layer in range(2 + (module == 3))}
    found = groups(names)
    assert len(found) == GROUPS and list(found)[-1] == OTHERS and "m3" in found
    assert sum(map(len, found.values())) == len(names)


def test_medians_are_of_those_that_come_so_far() -> None:
    assert medians([[(1, 4.0), (2, 1.0)], [(1, 2.0)], [(1, 9.0), (2, 3.0)]]) == [(1, 4.0), (2, 2.0)]


@pytest.mark.parametrize(("sigma", "kept"), [([2.0, 1.0, 1e-14, 0.0], [2.0, 1.0]), ([1.0], [1.0]), ([0.0, 0.0], [])])
def test_rounding_and_zeros_have_no_place(sigma: list[float], kept: list[float]) -> None:
    assert shown(sigma) == kept


def test_rank_one_alone_is_a_dot() -> None:
    ax = Figure().subplots()
    draw_spectra(ax, {"q.weight": [2.0], "v.weight": [3.0]})
    assert [list(line.get_xydata()[0]) for line in ax.lines] == [[1.0, 2.0], [1.0, 3.0]]  # type: ignore[index]
