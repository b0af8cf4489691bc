"""Every format against every kind of change on every kind of layer, and every pair of formats there and back.

python tests/formats/test_matrix.py     writes the table into spec/formats/README.md
"""

from __future__ import annotations

import sys
from functools import cache
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from loratools.adapter import Adapter  # noqa: E402
from loratools.deltas.base import Additive, Delta  # noqa: E402
from loratools.errors import LoratoolsError, NotExpressible  # noqa: E402
from loratools.formats import FORMATS, encode  # noqa: E402
from loratools.refs import Spec  # noqa: E402
from loratools.tensors import to_ref  # noqa: E402
from tests.formats.matrix import KINDS, LAYERS, ROWS, Draw, adapter_of, cell, contents, options_of, row_of  # noqa: E402
from tests.strategies import randn  # noqa: E402

DOCUMENT = ROOT / "spec" / "formats" / "README.md"
BEGIN, END = "<!-- table: written by tests/formats/test_matrix.py -->\n", "<!-- end of table -->\n"
# have names for the weights of known models alone; their own tests hold them
MODELLED = ("gguf", "torchtune", "litgpt", "trtllm", "nemo", "cloneofsimo", "samlora", "xlabs")
WRITTEN = [row.name for row in FORMATS if row.encode is not None and row.name not in MODELLED]


@cache
def found(kind: str, layer: str, format: str) -> str:
    return cell(kind, layer, format)


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("kind", KINDS)
def test_read_back_it_is_the_same_or_the_error_names_tensor_and_way(kind: str, format: str) -> None:
    """`cell` asserts it all; loratools' own format says everything."""
    cells = {found(kind, layer, format) for layer in KINDS[kind][1]}
    assert cells == {"yes"} or format != "loratools"


def table() -> str:
    """The rows of the matrix, and the reasons of its noes by their numbers."""
    reasons: dict[str, int] = {}
    lines = [f"| change | layer | {' | '.join(WRITTEN)} |", "|---|---|" + "---|" * len(WRITTEN)]
    for kind, layer in ROWS:
        cells = [found(kind, layer, format) for format in WRITTEN]
        told = [text if text == "yes" else f"no {reasons.setdefault(text.removeprefix('no: '), len(reasons) + 1)}" for text in cells]
        lines.append(f"| {kind} | {layer} | {' | '.join(told)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in reasons.items())]) + "\n"


def test_the_table_is_what_the_code_does() -> None:
    text = DOCUMENT.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table(), "run python tests/formats/test_matrix.py"


def test_each_page_is_told_of() -> None:
    pages = {path.name for path in DOCUMENT.parent.glob("*.md")} - {"README.md"}
    text = DOCUMENT.read_text()
    assert all(f"]({page})" in text for page in pages), pages


# -- from each format to each other and back, on a base that gives flat names their dots

DTYPES = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # a unit in the last place of 1
PAIRED = (
    "LoRA", "rsLoRA", "DoRA, a magnitude for each output", "LoHa", "LoKr", "Tucker", "GLoRA of LyCORIS", "outputs turned (LyCORIS' OFT)",
)  # fmt: skip
CASES = [(kind, layer) for kind in PAIRED for layer in KINDS[kind][1]]


def base_of(layer: str) -> dict[str, Spec]:
    module, leaf, shape, _ = LAYERS[layer]
    return {f"blocks.0.{module}.{leaf}": Spec("F64", shape)}


def through(adapter: Adapter, format: str, layer: str) -> Adapter:
    """An adapter under a base's names, written in a format, read and under the base's names again."""
    return row_of(format).decode(encode(adapter, format), options_of(format)).resolve(base_of(layer))


def made(delta: Delta, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64: what it makes of a weight, and what its rounding is measured by: |B||A|, else the weight made."""
    spec = next(iter(base_of(layer).values()))
    rows, columns = delta.matrix(spec)
    part, W = slice(0, rows), randn(*spec.shape, seed=99).double()
    if isinstance(delta, Additive):
        ΔW, product = delta.bind_dense(spec)(part).clone(), delta.product()
        return ΔW, ΔW.abs() if product is None else product[0].abs() @ product[1].abs()
    read = to_ref(W)
    assert read.spec == spec
    found = delta.bind(spec, lambda rows: iter([(part, W.reshape(-1, columns).clone())]))(part, W.reshape(-1, columns).clone())
    return found, found.abs()


@pytest.mark.parametrize(("one", "other"), list(permutations(WRITTEN, 2)))
def test_there_and_back(one: str, other: str) -> None:
    """Alphas and factors go untouched, so that all there could be is a scaling's last bits; numbers are drawn from the pair's own seed."""
    reached = 0
    for number, (kind, layer) in enumerate(CASES):
        for place, (dtype, unit) in enumerate(DTYPES.items()):
            seed = 100 * number + place + 1000 * (WRITTEN.index(one) * len(WRITTEN) + WRITTEN.index(other))
            name = next(iter(base_of(layer)))
            adapter = Adapter({name: next(iter(adapter_of(kind, layer, "loratools", Draw(seed, dtype)).values()))})
            try:
                start = through(adapter, one, layer)
                middle = through(start, other, layer)
                back = through(middle, one, layer)
            except LoratoolsError as error:
                first = getattr(error, "errors", [error])[0]
                assert isinstance(first, NotExpressible) and first.tensor, error
                continue
            reached += 1
            assert contents(start[name]) == contents(middle[name]) == contents(back[name])
            (before, size), (after, _) = made(start[name], layer), made(back[name], layer)
            assert (before - after).norm() <= 2 * unit * size.norm()
            assert back[name].facts().get("scaling") == start[name].facts().get("scaling")
    assert reached, "no change that both can say"


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table() + text[text.index(END) :])
