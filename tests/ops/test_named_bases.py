"""Merges onto variants of a model's files, and onto bases whose names are not quite the adapter's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import merge, verify
from loratools.errors import LoratoolsError
from tests.files import (
    llama_config,
    llama_tensors,
    read_adapter,
    read_checkpoint,
    read_config,
    write_checkpoint,
    write_pickled,
)
from tests.ops._bases import llama_lora, lora, same
from tests.strategies import randn


@pytest.mark.parametrize("shards", [1, 2])
def test_a_variant_keeps_its_names(tmp_path: Path, shards: int) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(torch.float16), llama_config(), shards=shards)
    variants = {"model-": "model.fp16-", "model.safetensors.index.json": "model.safetensors.index.fp16.json"}
    variants["model.safetensors"] = "model.fp16.safetensors"
    names = {path.name: path.name for path in base.iterdir()}
    for name in names:
        old = next((old for old in variants if name.startswith(old)), "")
        names[name] = name.replace(old, variants.get(old, ""), 1)
    for name, variant in names.items():
        (base / name).rename(base / variant)
        if variant.endswith(".index.fp16.json"):
            (base / variant).write_text((base / variant).read_text().replace("model-", "model.fp16-"))
    adapter = llama_lora(tmp_path / "adapter")
    receipt = merge(base, adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names.values(), "loratools.json"} and receipt["left_out"] == []
    assert verify(tmp_path / "out", base=base, adapters=adapter)["ok"]
    # beside the plain weights those win, as in transformers; the variant's own path opens it
    write_checkpoint(base, llama_tensors(), llama_config())
    receipt = merge(base, adapter, tmp_path / "plain")
    weights = {name for name in names.values() if name != "config.json"}
    assert {row["name"] for row in receipt["left_out"]} == weights and (tmp_path / "plain" / "model.safetensors").is_file()
    chosen = "model.safetensors.index.fp16.json" if shards > 1 else "model.fp16.safetensors"
    out = tmp_path / ("chosen" if shards > 1 else "chosen.safetensors")
    merge(base / chosen, adapter, out)
    assert same(out, tmp_path / "out")
    with pytest.raises(LoratoolsError, match="is, holds or lies inside the input"):
        merge(base / chosen, adapter, base / "out.safetensors" if shards > 1 else base / chosen, overwrite=True)


def test_a_base_saved_without_its_head(tmp_path: Path) -> None:
    """GPT-2 on the Hub has `h.0…`, an adapter of GPT2LMHeadModel `transformer.h.0…` and its head `lm_head`; and the other way round."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=11, n_positions=6, architectures=["GPT2LMHeadModel"]))
    model.save_pretrained(tmp_path / "base")
    config = {**read_config(tmp_path / "base"), "architectures": ["GPT2LMHeadModel"]}
    write_checkpoint(tmp_path / "base", read_checkpoint(tmp_path / "base"), config)
    W = read_checkpoint(tmp_path / "base")
    adapter = lora(tmp_path / "adapter", {"transformer.h.0.attn.c_proj": (8, 8), "lm_head": (11, 8)}, fan_in_fan_out=True)
    receipt = merge(tmp_path / "base", adapter, tmp_path / "out", untie=True)
    assert receipt["applied"] == 2
    assert "names aligned for the whole adapter: prefix 'transformer.' removed; as they are: lm_head.weight" in receipt["notes"]
    found = read_checkpoint(tmp_path / "out")
    tensors, _ = read_adapter(adapter)
    for name, old, turned in (("h.0.attn.c_proj", W["h.0.attn.c_proj.weight"], True), ("lm_head", W["wte.weight"], False)):
        A, B = (next(tensor.double() for key, tensor in tensors.items() if f"{name}.lora_{part}" in key) for part in "AB")
        delta = 2 * (B @ A)  # alpha 4 / rank 2
        assert torch.equal(found[f"{name}.weight"], (old.double() + (delta.T if turned else delta)).float())


def test_an_old_bert(tmp_path: Path) -> None:
    """`LayerNorm.gamma` and `beta` in a pickle, as Google's BERT was converted; the adapter says `weight` and `bias`."""
    base = {
        "bert.encoder.layer.0.output.dense.weight": randn(8, 8, seed=0), "bert.encoder.layer.0.output.dense.bias": randn(8, seed=1),
        "bert.encoder.layer.0.output.LayerNorm.gamma": randn(8, seed=2), "bert.encoder.layer.0.output.LayerNorm.beta": randn(8, seed=3),
    }  # fmt: skip
    write_pickled(tmp_path / "base", base, {"model_type": "bert"})
    saved = {"encoder.layer.0.output.LayerNorm.weight": torch.ones(8), "encoder.layer.0.output.LayerNorm.bias": torch.zeros(8)}
    adapter = lora(tmp_path / "adapter", {"encoder.layer.0.output.dense": (8, 8)}, saved, modules_to_save=["LayerNorm"])
    receipt = merge(tmp_path / "base", adapter, tmp_path / "out")
    aligned, spelt = (note for note in receipt["notes"] if "align" in note or "spells" in note)
    assert aligned == "names aligned for the whole adapter: prefix 'bert.' added"
    assert spelt.startswith("names as the base spells them: encoder.layer.0.output.LayerNorm.") and spelt.endswith(", and 1 more alike")
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == base.keys() and receipt["applied"] == receipt["expected"] == 3
    assert torch.equal(found["bert.encoder.layer.0.output.LayerNorm.gamma"], torch.ones(8))
    assert torch.equal(found["bert.encoder.layer.0.output.LayerNorm.beta"], torch.zeros(8))
    assert verify(tmp_path / "out", base=tmp_path / "base", adapters=adapter)["ok"]
