"""The whole page: which panels stand on it, that none lies over another, for 2 modules and for 400; the same bytes each time."""

from __future__ import annotations

import hashlib
import re
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from loratools.ops._budget_plot import Curve
from loratools.ops._figure import styled
from loratools.ops._heatmap import Panel
from loratools.ops._page import Page, draw, made

CURVE = Curve([(1000, 0.5), (2000, 0.1), (3000, 0.0)], [(1000, 0.5, 1), (3000, 0.0, 2)], (3000, 0.0), "as it is")


def page(layers: int, modules: int, *, all: bool = True) -> Page:
    names = [f"model.layers.{layer}.self_attn.m{module}_proj.weight" for layer in range(layers) for module in range(modules)]
    heats = [Panel(title, "‖ΔW‖", {name: 1.0 + index for index, name in enumerate(names)}, 1.0, len(names) + 1.0, log=True, form=".2g")
             for title in ("one", "other")]  # fmt: skip
    more = {"curve": CURVE, "drift": {name: [0.0, 0.01, -0.02] for name in names}} if all else {}
    return Page("a title", "told", names, heats, spectra={name: [1.0, 0.5] for name in names}, **more)  # type: ignore[arg-type]


def titles(figure: Figure) -> list[str]:
    return [title for ax in figure.axes if (title := ax.get_title(loc="left"))]


@pytest.mark.parametrize(("layers", "modules"), [(1, 2), (22, 7), (40, 10), (3, 36), (1, 1), (90, 2)])
def test_no_panel_lies_over_another_or_leaves_the_page(layers: int, modules: int) -> None:
    with styled():
        figure = made(page(layers, modules))
        figure.canvas.draw()
        boxes = [box.transformed(figure.dpi_scale_trans.inverted()) for ax in figure.axes if (box := ax.get_tightbbox()) is not None]
    width, height = figure.get_size_inches()
    for box in boxes:
        assert box.x0 > -0.02 and box.x1 < width + 0.02 and box.y0 > -0.02 and box.y1 < height + 0.02
    for one, other in combinations(boxes, 2):
        assert one.x1 <= other.x0 + 0.03 or other.x1 <= one.x0 + 0.03 or one.y1 <= other.y0 + 0.03 or other.y1 <= one.y0 + 0.03
    assert len(titles(figure)) == 5 and width < 25 and height < 25


def test_only_the_panels_that_apply() -> None:
    assert titles(made(page(1, 2))) == ["one", "other", "Singular values of ΔW", "Error against size: what other ranks would give",
                                        "DoRA: drift of the magnitudes from the base's norms"]  # fmt: skip
    assert titles(made(page(1, 2, all=False))) == ["one", "other", "Singular values of ΔW"]


def test_numbers_stand_in_few_cells_and_a_missing_value_is_said() -> None:
    found = page(1, 2)
    few = made(found)
    assert [text.get_text() for text in few.axes[0].texts] == ["1", "2"]
    assert not made(page(40, 10)).axes[0].texts
    assert [text.get_text() for text in few.texts] == ["a title", "told"]
    gap = Page("t", "told", found.names, [Panel("one", "x", {found.names[0]: 0.5})])
    assert made(gap).texts[1].get_text() == "told   (grey: no value)"
    assert Page("t", "", found.names, [Panel("one", "x", {found.names[0]: None})]).empty and not gap.empty


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_the_same_page_gives_the_same_bytes(tmp_path: Path, ending: str) -> None:
    digests = set()
    for index in range(2):
        draw(tmp_path / f"{index}{ending}", page(2, 3))
        digests.add(hashlib.sha256((tmp_path / f"{index}{ending}").read_bytes()).hexdigest())
    assert len(digests) == 1 and sorted(path.name for path in tmp_path.iterdir()) == [f"0{ending}", f"1{ending}"]
    if ending == ".svg":
        text = (tmp_path / "0.svg").read_text()
        assert {"a title", "index i", "layer"} <= set(re.findall(r">([^<>]+)</text>", text)) and "<dc:date>" not in text
