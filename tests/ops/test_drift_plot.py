"""Magnitudes beside the base's norms: quantiles over all modules of a layer, and the bars that show them."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from loratools.ops._drift_plot import QUANTILES, by_layer, draw_drift


def test_quantiles_are_over_all_modules_of_a_layer() -> None:
    ratios = {"h.0.q.weight": [0.1, 0.2], "h.0.v.weight": [-0.3], "h.10.q.weight": [0.5, float("inf")], "head.weight": [0.0]}
    found = by_layer(ratios)
    assert list(found) == ["0", "10", "–"]
    np.testing.assert_allclose(found["0"], np.quantile([0.1, 0.2, -0.3], QUANTILES))
    assert found["10"] == [0.5] * 7


def test_the_bars_show_them_in_per_cent() -> None:
    values = {f"h.{layer}.q.weight": list(np.linspace(-0.01, 0.01 * (layer + 1), 101)) for layer in range(22)}
    ax = Figure().subplots()
    draw_drift(ax, values)
    assert len(ax.patches) == 2 * 22
    outer, inner = ax.patches[21], ax.patches[22 + 21]
    five, first, third, ninety = np.quantile(values["h.21.q.weight"], [0.05, 0.25, 0.75, 0.95]) * 100
    np.testing.assert_allclose([outer.get_y(), outer.get_y() + outer.get_height()], [five, ninety])  # type: ignore[attr-defined]
    np.testing.assert_allclose([inner.get_y(), inner.get_y() + inner.get_height()], [first, third])  # type: ignore[attr-defined]
    assert [text.get_text() for text in ax.get_xticklabels()] == [str(layer) for layer in range(22)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "m / ‖W‖ − 1, %")


def test_one_layer_and_eighty() -> None:
    for count in (1, 80):
        ax = Figure().subplots()
        draw_drift(ax, {f"h.{layer}.q.weight": [0.0, 0.1] for layer in range(count)})
        assert len(ax.patches) == 2 * count and 1 <= len(ax.get_xticklabels()) <= 50
