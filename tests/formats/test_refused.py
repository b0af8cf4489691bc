"""What a format cannot say is told with a way out, wherever it is said."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import loratools
from loratools.adapter import Adapter
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible
from loratools.formats import FORMATS, encode
from loratools.formats._refused import nothing, passengers
from loratools.tensors import to_ref
from tests.formats.cells import reason
from tests.formats.places import adapter_of

FILES = sorted((Path(loratools.__file__).parent / "formats").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_refusal_has_a_way_out(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "NotExpressible"]
    assert [node.lineno for node in made if "remedy" not in {word.arg for word in node.keywords}] == []


@pytest.mark.parametrize("format", [row.name for row in FORMATS if row.encode is not None])
def test_a_tensor_that_is_no_change_of_a_weight(format: str) -> None:
    """Never dropped: the own format carries any, kohya's and cloneofsimo's textual inversions."""
    kind, layer = ("LoRA of q and of v", "fused q, k and v") if format == "samlora" else ("LoRA", "linear")
    adapter = adapter_of(kind, layer, format)
    riding = Adapter(adapter.deltas, passengers={"rider": to_ref(torch.ones(2))}, flat=adapter.flat, model=adapter.model)
    if format == "loratools":
        assert len(encode(riding, format).tensors) == len(encode(adapter, format).tensors) + 1
        return
    with pytest.raises(NotExpressible, match=r"rider: .* no place for it; --format loratools keeps it"):
        encode(riding, format)


@pytest.mark.parametrize("format", ["loralib", "scratch", "torchtune", "litgpt", "nemo", "trtllm", "gguf", "mlx"])
def test_an_adapter_without_a_low_rank_change(format: str) -> None:
    whole = Adapter({"model.layers.0.self_attn.q_proj.weight": Replacement(value=to_ref(torch.ones(2, 2)))}, model={"model_type": "llama"})
    with pytest.raises(NotExpressible) as caught:
        encode(whole, format)
    assert reason(caught.value)


def test_words_alike() -> None:
    assert "is it the right file?" in str(nothing()) and "x: no low-rank change to write; convert it first" in str(nothing(tensor="x"))
    low = LowRank(A=to_ref(torch.ones(1, 2)), B=to_ref(torch.ones(2, 1)), alpha=1.0)
    assert passengers(Adapter({"x.weight": low}), "it has") == []
