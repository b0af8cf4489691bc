"""spec/: its examples run, its tables are the code's and the installed peft's, its links lead somewhere."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

import peft
import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratools.header import HEADER_LIMIT, build_header
from loratools.refs import BITS, Spec
from loratools.sidefiles import PRIVATE, WEIGHTS

SPEC = Path(__file__).parents[1] / "spec"
PAGES = sorted(SPEC.rglob("*.md"))


def rows(page: str, columns: int) -> list[list[str]]:
    """The cells of a page's tables of so many columns, backquotes taken off."""
    lines = [line for line in (SPEC / page).read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) == columns and not set(row[0]) <= {"-"} and row[0] != "layer"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_examples_run(page: Path) -> None:
    assert doctest.testfile(str(page), module_relative=False).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_tests_named_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub(r"`[^`]*`", "", text)):  # an expression may look like a link
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for target in re.findall(r"`(tests/[^`]+)`", text):
        assert (SPEC.parent / target).exists(), target


def test_every_page_is_in_the_index() -> None:
    text = (SPEC / "README.md").read_text()
    pages = {str(path.relative_to(SPEC)) for path in SPEC.rglob("*.*") if path.name != "README.md" and path.suffix != ".png"}
    assert {page for page in pages if f"]({page})" not in text} == set()


def test_every_picture_is_shown_by_a_page() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())}
    pictures = set(SPEC.rglob("*.png"))
    assert pictures == shown
    assert sum(path.stat().st_size for path in pictures if path.name.startswith("report-")) < 1_000_000


# -- formats/peft.md


LAYERS = {
    "Linear": nn.Linear(5, 7), "Conv1D": Conv1D(7, 5), "Conv1d": nn.Conv1d(5, 7, 3), "Conv2d": nn.Conv2d(5, 7, 3),
    "Conv3d": nn.Conv3d(5, 7, 3), "Embedding": nn.Embedding(11, 13), "MultiheadAttention": nn.MultiheadAttention(5, 1),
}  # fmt: skip
SIZES = {"r": 2, "in": 5, "out": 7, "k": 3, "vocabulary": 11, "dimension": 13, "1": 1, "E": 5, "3E": 15}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_table_of_keys_is_what_peft_writes(layer: str) -> None:
    found: dict[str, tuple[int, ...]] = {}
    for more in ({"use_dora": layer != "MultiheadAttention"}, *([{"lora_bias": True}] if layer == "Linear" else [])):
        config = peft.LoraConfig(r=2, target_modules=["x"], fan_in_fan_out=layer == "Conv1D", **more)
        model = peft.get_peft_model(nn.ModuleDict({"x": LAYERS[layer]}), config)
        for key, tensor in peft.get_peft_model_state_dict(model).items():
            assert key.startswith("base_model.model.x.")
            found[key.removeprefix("base_model.model.x")] = tuple(tensor.shape)
        model.unload()
    table = {key: shape.strip("()").split(", ") for name, key, shape in rows("formats/peft.md", 3) if name == layer}
    assert {key: tuple(SIZES[size] for size in shape) for key, shape in table.items()} == found


# -- checkpoint.md


def test_dtypes_bits_and_the_literal_of_a_file() -> None:
    text = (SPEC / "checkpoint.md").read_text()
    part = text[text.index("dtypes, by bits:") : text.index("All pass through")]
    table = {name: int(bits) for names, bits in re.findall(r"((?:`\w+`\s+)+)(\d+)", part) for name in re.findall(r"`(\w+)`", names)}
    assert table == BITS
    assert f"{HEADER_LIMIT:,}".replace(",", " ") in text
    header = build_header({"a": Spec("U8", (2,))}, {"format": "pt"})[0]
    assert header.decode().replace(" ", "␣") in text
    assert f"N = {len(header)}" in text


def test_the_files_left_out_are_the_codes() -> None:
    text = (SPEC / "checkpoint.md").read_text()
    endings = re.search(r"training state: `([^`]*)`", text)
    assert endings
    assert all(WEIGHTS.fullmatch(f"x{ending}") for ending in endings[1].split())
    assert {re.escape(ending[1:]) for ending in endings[1].split()} == set(WEIGHTS.pattern.partition("(")[2].partition(")")[0].split("|"))
    assert f"`{' '.join(PRIVATE)}`" in text


def test_the_example_of_patterns() -> None:
    from loratools.formats.peft_config import parse

    text = (SPEC / "formats/peft.md").read_text()
    config = parse(json.loads(next(line for line in text.splitlines() if line.startswith("    {"))))
    names = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"]
    assert [(config.rank(name), config.alpha_of(name)) for name in names] == [(4, 16.0), (8, 16.0), (8, 16.0), (8, 16.0)]
