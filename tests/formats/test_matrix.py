"""Every format against every kind of change on every kind of layer.

python tests/formats/test_matrix.py     writes the table into spec/formats/README.md
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from loratools.formats import FORMATS  # noqa: E402
from tests.formats.cells import cell  # noqa: E402
from tests.formats.matrix import KINDS, ROWS  # noqa: E402
from tests.formats.places import PLACES  # noqa: E402

DOCUMENT = ROOT / "spec" / "formats" / "README.md"
BEGIN, END = "<!-- table: written by tests/formats/test_matrix.py -->\n", "<!-- end of table -->\n"
COLUMNS = [row.name for row in FORMATS if row.encode is not None]
MODELLED = [name for name in COLUMNS if name in PLACES and PLACES[name].names]  # have names for the weights of known models alone
WRITTEN = [name for name in COLUMNS if name not in MODELLED]


@cache
def found(kind: str, layer: str, format: str) -> str:
    return cell(kind, layer, format)


@pytest.mark.parametrize("format", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_read_back_it_is_the_same_or_the_error_names_tensor_and_way(kind: str, format: str) -> None:
    """`cell` asserts it all; loratools' own format says everything."""
    cells = {found(kind, layer, format) for layer in KINDS[kind][1]}
    assert cells == {"yes"} or format != "loratools"


def table() -> str:
    """The rows of the matrix, and the reasons of its noes by their numbers."""
    reasons: dict[str, int] = {}
    lines = [f"| change | layer | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for kind, layer in ROWS:
        cells = [found(kind, layer, format) for format in COLUMNS]
        told = [f"no {reasons.setdefault(text[4:], len(reasons) + 1)}" if text.startswith("no: ") else text for text in cells]
        lines.append(f"| {kind} | {layer} | {' | '.join(told)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in reasons.items())]) + "\n"


def test_the_table_is_what_the_code_does() -> None:
    text = DOCUMENT.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table(), "run python tests/formats/test_matrix.py"


def test_each_page_is_told_of() -> None:
    pages = {path.name for path in DOCUMENT.parent.glob("*.md")} - {"README.md"}
    text = DOCUMENT.read_text()
    assert all(f"]({page})" in text for page in pages), pages


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :])
