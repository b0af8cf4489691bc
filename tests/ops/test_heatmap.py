"""Heatmaps: the grid of layers and modules, files of each kind that are the same each time, and scales."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from loratools.adapter import Adapter
from loratools.ops._heatmap import Panel, draw, grid, paint
from loratools.ops.compare import compare
from tests.ops._lora import low

MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")


def llama(layers: int) -> list[str]:
    return [f"model.layers.{layer}.{module}.weight" for layer in range(layers) for module in MODULES]


def panels(names: list[str]) -> list[Panel]:
    values: dict[str, float | None] = {name: index / len(names) for index, name in enumerate(names)}
    return [Panel("a sign", "cosine", {**values, names[0]: None, names[-1]: -1.0}, -1.0), Panel("no sign", "share", values)]


def size(path: Path) -> tuple[int, int]:
    """(width, height) of a PNG, from its header."""
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


def test_layers_go_across_in_the_order_of_their_numbers() -> None:
    names = ["model.layers.10.q.weight", "model.layers.9.q.weight", "model.layers.9.up.weight", "lm_head.weight"]
    rows, columns, cells = grid(names)
    assert (rows, columns) == (["q", "up", "lm_head"], ["9", "10", "–"])
    assert cells == {names[0]: (0, 1), names[1]: (0, 0), names[2]: (1, 0), names[3]: (2, 2)}


def test_several_stacks_keep_their_names() -> None:
    _, columns, cells = grid(["encoder.block.1.q.weight", "decoder.block.0.q.weight", "decoder.block.1.k.weight"])
    assert columns == ["encoder.block.1", "decoder.block.0", "decoder.block.1"] and len(set(cells.values())) == 3


def test_a_stack_alone_in_no_layer() -> None:
    assert grid(["fc1.weight", "fc2.weight"]) == (["fc1", "fc2"], ["–"], {"fc1.weight": (0, 0), "fc2.weight": (1, 0)})


@pytest.mark.parametrize(("ending", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_same_figure_gives_the_same_bytes(tmp_path: Path, ending: str, begins: bytes) -> None:
    names = llama(3)
    digests = []
    for index in range(2):
        draw(tmp_path / f"{index}{ending}", panels(names), title="one and other", names=names)
        data = (tmp_path / f"{index}{ending}").read_bytes()
        assert data.startswith(begins)
        digests.append(hashlib.sha256(data).hexdigest())
    assert digests[0] == digests[1] and sorted(path.name for path in tmp_path.iterdir()) == [f"0{ending}", f"1{ending}"]


def texts(path: Path) -> list[str]:
    return re.findall(r">([^<>]+)</text>", path.read_text())


def test_titles_axes_units_and_numbers_are_written(tmp_path: Path) -> None:
    names = [*llama(2), "lm_head.weight"]
    draw(tmp_path / "few.svg", panels(names), title="one and other", names=names)
    found = texts(tmp_path / "few.svg")
    assert {"a sign", "no sign", "cosine", "share", "module", "layer (–: in none)", *MODULES, "lm_head", "0", "1", "–"} <= set(found)
    assert "one and other" in found and any(text.startswith("grey: no value") for text in found)
    assert found.count("-1.00") == 1 and found.count("0.14") == 2 and found.count("0.00") == 1  # as the first cell of one has no value


def test_many_modules_are_readable(tmp_path: Path) -> None:
    """Of 400 modules no number stands in a cell, every module has its name, and a cell is at least 20 pixels wide."""
    names = [f"model.layers.{layer}.m{module}.weight" for layer in range(40) for module in range(10)]
    draw(tmp_path / "many.svg", panels(names), title="t", names=names)
    found = texts(tmp_path / "many.svg")
    assert {f"m{module}" for module in range(10)} <= set(found) and not [text for text in found if re.fullmatch(r"-?\d\.\d\d", text)]
    draw(tmp_path / "many.png", panels(names), title="t", names=names)
    width, height = size(tmp_path / "many.png")
    assert width >= 40 * 20 and height >= 2 * 10 * 20
    draw(tmp_path / "two.png", panels(llama(1)[:2]), title="t", names=llama(1)[:2])
    assert 400 <= size(tmp_path / "two.png")[0] <= 1200


def test_tall_grids_stand_beside_each_other(tmp_path: Path) -> None:
    names = [f"block.{layer}.m{module}.weight" for layer in range(3) for module in range(60)]
    draw(tmp_path / "tall.png", panels(names), title="t", names=names)
    width, height = size(tmp_path / "tall.png")
    assert height > width


def test_a_comparison_is_drawn(tmp_path: Path) -> None:
    deltas = [{name: low((20, 7), 2, seed + index) for index, name in enumerate(llama(2))} for seed in (0, 9)]
    del deltas[1][llama(2)[0]]
    found = compare(*[Adapter(deltas=dict(one)) for one in deltas], plot=tmp_path / "both.svg")
    shown = texts(tmp_path / "both.svg")
    for row in found["modules"]:
        for key in ("cosine", "column_overlap", "row_overlap"):
            assert f"{row[key]:.2f}" in shown
    assert any(text.startswith("grey") for text in shown)


def test_a_logarithmic_scale_holds_zeros_and_writes_numbers_as_asked() -> None:
    ax = Figure().subplots()
    values: dict[str, float | None] = {"h.0.q.weight": 0.0, "h.1.q.weight": 0.01, "h.2.q.weight": 1.0}
    cells = {name: (0, column) for column, name in enumerate(values)}
    paint(ax.figure, ax, Panel("t", "x", values, 0.01, 1.0, log=True, form=".2g"), (1, 3), cells, few=True)  # type: ignore[arg-type]
    image = ax.images[0]
    assert image.norm(image.get_array()).tolist() == [[0.0, 0.0, 1.0]]  # type: ignore[arg-type,union-attr]
    assert [text.get_text() for text in ax.texts] == ["0", "0.01", "1"]
