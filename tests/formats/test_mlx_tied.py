"""Heads tied to their embedding: MLX's change of the one is that of both, and what changes one alone is nothing MLX could say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import convert, merge
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible
from loratools.families import Family
from loratools.formats.mlx_tied import both, spoken
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.files import read_checkpoint, read_config
from tests.interop.trained import assert_same, hugging_face, logits_of, merged_logits, peft_adapter, recorded
from tests.strategies import randn

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
SPEC = Spec("F32", (6, 4))


def low(seed: int = 0, layer: str = "embedding") -> LowRank:
    return LowRank(A=to_ref(randn(2, 4, seed=seed)), B=to_ref(randn(6, 2, seed=seed + 1)), alpha=4.0, layer=layer)


def dora(seed: int = 0, layer: str = "embedding", **more: int) -> DoRA:
    return DoRA(direction=low(seed, layer), magnitude=to_ref(randn(6, 1, seed=more.get("of", 9))))


@pytest.mark.parametrize("delta", [low(), dora()], ids=["lora", "dora"])
def test_the_head_changes_too(delta: Delta) -> None:
    found = both({TABLE: delta}, {TABLE: SPEC, HEAD: SPEC}, Family(CONFIG))
    made = found[HEAD]
    inner = made.direction if isinstance(made, DoRA) else made
    assert found[TABLE] is delta and isinstance(inner, LowRank) and inner.layer == "linear"
    assert list(spoken(Adapter(dict(found), model=CONFIG))) == [TABLE]
    for config in (CONFIG | {"tie_word_embeddings": False}, {}):
        assert list(both({TABLE: delta}, {TABLE: SPEC, HEAD: SPEC}, Family(config))) == [TABLE]
    assert both({TABLE: delta, HEAD: low(5)}, {TABLE: SPEC, HEAD: SPEC}, Family(CONFIG))[HEAD] is not made


ALONE: dict[str, tuple[dict[str, Delta], str]] = {
    "an embedding": ({TABLE: low()}, r"one module for model\.embed_tokens\.weight and lm_head\.weight.*changes model\.embed_tokens"),
    "a head": ({HEAD: low(layer="linear")}, r"the adapter changes lm_head\.weight alone; merge --untie"),
    "others": ({TABLE: low(), HEAD: low(3, "linear")}, "each in a way of its own"),
    "other magnitudes": ({TABLE: dora(), HEAD: dora(layer="linear", of=8)}, "each in a way of its own"),
    "other kinds": ({TABLE: dora(), HEAD: low(layer="linear")}, "each in a way of its own"),
    "whole": ({TABLE: Replacement(value=to_ref(randn(6, 4, seed=0))), HEAD: low()}, "each in a way of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", ALONE)
def test_what_mlx_cannot_say(case: str) -> None:
    deltas, said = ALONE[case]
    with pytest.raises(NotExpressible, match=said):
        spoken(Adapter(deltas, model=CONFIG))
    for model in (CONFIG | {"tie_word_embeddings": False}, {}):
        assert spoken(Adapter(deltas, model=model)) == deltas


@pytest.mark.parametrize("case", ["tied-lora", "tied-dora"])
def test_it_stays_tied(tmp_path: Path, case: str) -> None:
    base, adapter, _ = recorded("mlx", case)
    receipt = merge(base, adapter, tmp_path / "out")
    assert any("lm_head.weight stays tied" in note for note in receipt["notes"]), receipt["notes"]
    assert HEAD not in read_checkpoint(tmp_path / "out") and read_config(tmp_path / "out")["tie_word_embeddings"] is True


def test_by_peft_it_is_a_change_of_both(tmp_path: Path) -> None:
    base, adapter, logits = recorded("mlx", "tied-lora")
    convert(adapter, tmp_path / "peft", format="peft", base=base)
    names = {name.removeprefix("base_model.model.") for name in read_checkpoint(tmp_path / "peft")}
    assert {"model.embed_tokens.lora_embedding_A", "lm_head.lora_A.weight"} <= names
    assert_same(merged_logits(base, tmp_path / "peft", tmp_path / "out"), logits, logits_of(hugging_face(base)))
    convert(tmp_path / "peft", tmp_path / "mlx", format="mlx", base=base)
    again, first = read_checkpoint(tmp_path / "mlx"), read_checkpoint(adapter)
    assert again.keys() == first.keys() and all(torch.equal(tensor, first[name]) for name, tensor in again.items())


def test_peft_of_an_embedding_alone(tmp_path: Path) -> None:
    base = recorded("mlx", "tied-lora")[0]
    peft_adapter(base, tmp_path / "one", targets=["embed_tokens"])
    with pytest.raises(NotExpressible, match=r"which are tied, and the adapter changes model\.embed_tokens\.weight alone"):
        convert(tmp_path / "one", tmp_path / "none", format="mlx", base=base)
