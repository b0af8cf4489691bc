"""litgpt: adapters that it trained and saved are what loratools merges, and what loratools writes is what it loads and merges.

Its own logits lie beside the adapters in tests/data/trained/litgpt; where litgpt is installed it runs anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import convert
from loratools.formats import load
from tests.interop.trained import assert_same, cases, hugging_face, logits_of, make_base, merged_logits, peft_adapter, recorded

LIVE = 'install litgpt, without its pins: pip install --no-deps litgpt; pip install lightning "jsonargparse[signatures]==4.41.0"'
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
TARGETS = {
    "llama": LLAMA, "qwen2": ["k_proj", "v_proj", "down_proj", "gate_proj", "up_proj"], "qwen3": LLAMA[:4],
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"], "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h", "dense_h_to_4h"],
}  # fmt: skip


def live() -> Any:
    """litgpt run by its own functions."""
    for module in ("lightning", "jsonargparse", "litgpt"):
        pytest.importorskip(module, reason=LIVE)
    from tests.interop.trainers import with_litgpt

    return with_litgpt


@pytest.mark.parametrize("case", cases("litgpt"))
def test_what_it_trained(tmp_path: Path, case: str) -> None:
    base, adapter, logits = recorded("litgpt", case)
    assert load(adapter).format == "litgpt"
    assert_same(merged_logits(base, adapter, tmp_path / "out"), logits, logits_of(hugging_face(base)))


@pytest.mark.parametrize("case", cases("litgpt"))
def test_there_and_back(tmp_path: Path, case: str) -> None:
    base, adapter, logits = recorded("litgpt", case)
    convert(adapter, tmp_path / "lit", format="litgpt", base=base)
    if not case.startswith(("phi3", "gpt_neox")):  # whose fused weights have one change of a higher rank in transformers' names
        tensors, before = (torch.load(folder / "lit_model.pth.lora")["model"] for folder in (tmp_path / "lit", adapter))
        assert tensors.keys() == before.keys() and all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert_same(merged_logits(base, tmp_path / "lit", tmp_path / "out"), logits, logits_of(hugging_face(base)))


def test_a_file_of_numbered_modules_alone(tmp_path: Path) -> None:
    """fc_1 is a name, not a block's number."""
    tensors = torch.load(recorded("litgpt", "llama-lora")[1] / "lit_model.pth.lora")["model"]
    torch.save({"model": {name: tensor for name, tensor in tensors.items() if ".fc_1." in name}}, tmp_path / "lit_model.pth.lora")
    (tmp_path / "hyperparameters.yaml").write_text("lora_r: 4\nlora_alpha: 12\n")
    (tmp_path / "model_config.yaml").write_text("name: Llama-3-8B\nn_head: 4\nn_query_groups: 2\nhead_size: 4\n")
    assert set(load(tmp_path)) == {f"model.layers.{layer}.mlp.gate_proj.weight" for layer in range(2)}


@pytest.mark.parametrize("case", cases("litgpt"))
def test_what_it_trains(tmp_path: Path, case: str) -> None:
    """Trained now, and as litgpt itself loads what it saved, and merges it."""
    lit = live()
    base, adapter = recorded("litgpt", case)[0], tmp_path / "adapter"
    trained = lit.train(case, base, adapter)
    plain = lit.plain(base)
    beside, merged = lit.logits(base, adapter)
    assert torch.equal(beside, trained)
    assert_same(merged, trained, plain)
    assert_same(merged_logits(base, adapter, tmp_path / "out"), trained, plain)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_it_loads_and_merges_what_peft_saved(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    lit = live()
    make_base(kind, tmp_path / "base")
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", targets=TARGETS[kind], **more)
    convert(tmp_path / "peft", tmp_path / "lit", format="litgpt", base=tmp_path / "base")
    plain = lit.plain(tmp_path / "base")
    for found in lit.logits(tmp_path / "base", tmp_path / "lit"):
        assert_same(found, logits, plain)
