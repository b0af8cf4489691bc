"""Merges onto quantised bases: refused by name, or with --dequantize onto the plain copy, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from torch import Tensor

from loratools import extract, inspect, merge, verify
from loratools.digests import combined_digest
from loratools.errors import OptionError, QuantizedError
from tests.files import (
    four_bit,
    fp8_blocks,
    llama_config,
    llama_tensors,
    raw,
    read_checkpoint,
    read_config,
    write_checkpoint,
)
from tests.ops._bases import llama_lora, lora, pipeline, same
from tests.ops._lora import checked
from tests.strategies import randn


def quantised(folder: Path, kind: str, *, shards: int = 1, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """A Llama whose layers' matrices are quantised, and the plain bfloat16 copy that stands for it."""
    tensors, plain = dict[str, Tensor](), dict[str, Tensor]()
    for name, W in llama_tensors(torch.bfloat16).items():
        plain[name] = W
        if "_proj" not in name:
            tensors[name] = W
        elif kind == "fp8":
            tensors[name], scale = fp8_blocks(W.float(), (3, 5))
            tensors[f"{name}_scale_inv"] = scale
            wide = scale.double().repeat_interleave(3, 0)[: len(W)].repeat_interleave(5, 1)[:, : W.shape[1]]
            plain[name] = (tensors[name].double() * wide).bfloat16()
        else:
            parts = four_bit(name, W, nested=False, size=16)
            tensors |= parts
            codes = parts[name].view(-1).to(torch.int64)
            values = parts[f"{name}.quant_map"].double()[torch.stack([codes >> 4, codes & 15], 1).view(-1)]
            plain[name] = (values.view(-1, 16) * parts[f"{name}.absmax"].double()[:, None]).view(W.shape).bfloat16()
    stated = {"fp8": {"quant_method": "fp8", "weight_block_size": [3, 5]}, "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    more = {"quantization_config": stated[kind], "torch_dtype": "bfloat16"} | config
    base = write_checkpoint(folder, tensors, llama_config(**more), shards=shards)
    return base, plain


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
@pytest.mark.parametrize("shards", [1, 2])
def test_dequantising_and_merging_is_merging_onto_the_plain_copy(tmp_path: Path, kind: str, shards: int) -> None:
    base, plain = quantised(tmp_path / "base", kind, shards=shards)
    copy = write_checkpoint(tmp_path / "copy", plain, llama_config(torch_dtype="bfloat16"), shards=shards)
    adapter = llama_lora(tmp_path / "adapter")
    with pytest.raises(QuantizedError, match=r"quantised: found (fp8|bitsandbytes); merge into .*, or give --dequantize to merge onto"):
        merge(base, adapter, tmp_path / "out")
    merge(copy, adapter, tmp_path / "expected")
    for threads in (1, 3):
        receipt = merge(base, adapter, tmp_path / "out", dequantize=True, threads=threads, overwrite=True)
        assert checked(receipt, tmp_path / "out") and same(tmp_path / "out", tmp_path / "expected")
    assert read_config(tmp_path / "out") == read_config(copy)
    assert receipt["changed_files"] == ["config.json", *(["model.safetensors.index.json"] if shards > 1 else [])]
    assert receipt["applied"] == receipt["expected"] == 4 and len(receipt["digests"]) == len(plain)
    assert all(0.5 < row["survived"] <= 1 and row["unchanged"] < 0.5 for row in receipt["tensors"])
    assert receipt["notes"][0] == f"dequantised ({'fp8' if kind == 'fp8' else 'bitsandbytes'}): 12 weights as BF16"
    if shards > 1:
        before, after = (json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (copy, tmp_path / "out"))
        assert after["weight_map"].keys() == before["weight_map"].keys() and after["metadata"] == before["metadata"]
    report = verify(tmp_path / "out", base=base, adapters=adapter, forward=True)
    assert report["ok"] and (report["digests"], report["replayed"], report["max_ulp"]) == (len(plain), len(plain), 0)
    # at strength 0 it is the copy
    merge(base, f"{adapter}:0", tmp_path / "zero", dequantize=True)
    assert same(tmp_path / "zero", copy)


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_the_receipt_of_a_quantised_base_is_of_what_it_stores(tmp_path: Path, kind: str) -> None:
    """Its identity is that of the codes and scales: another scale, another base."""
    base, _ = quantised(tmp_path / "base", kind)
    adapter = llama_lora(tmp_path / "adapter")
    first = merge(base, adapter, tmp_path / "one", dequantize=True)["inputs"][0]
    stored = {name: blake3(raw(tensor)).hexdigest() for name, tensor in read_checkpoint(base).items()}
    assert first["blake3"] == combined_digest(stored) and first["header_sha256"] is not None


def test_dequantised_in_another_dtype(tmp_path: Path) -> None:
    base, _ = quantised(tmp_path / "base", "nf4")
    adapter = llama_lora(tmp_path / "adapter")
    receipt = merge(base, adapter, tmp_path / "out", dequantize=True, dtype="float32")
    assert {tensor.dtype for tensor in read_checkpoint(tmp_path / "out").values()} == {torch.float32}
    assert read_config(tmp_path / "out") == llama_config(torch_dtype="float32") and "12 weights as F32" in receipt["notes"][0]
    assert verify(tmp_path / "out", base=base, adapters=adapter)["ok"]
    # one file: nothing beside it is written, and that is said
    receipt = merge(base / "model.safetensors", adapter, tmp_path / "out.safetensors", dequantize=True)
    assert any("config.json it is used with must lose its quantization_config" in note for note in receipt["notes"])


def test_what_dequantize_does_not_do(tmp_path: Path) -> None:
    adapter = llama_lora(tmp_path / "adapter")
    base, _ = quantised(tmp_path / "base", "fp8")
    with pytest.raises(OptionError, match=r"--reversible needs a base whose files.*weights that are dequantised"):
        merge(base, adapter, tmp_path / "out", dequantize=True, reversible=True)
    with pytest.raises(QuantizedError, match="its weights are quantised: found fp8"):
        extract(base, base, tmp_path / "out", rank=1)
    gptq = write_checkpoint(tmp_path / "gptq", llama_tensors(), llama_config(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(QuantizedError, match=r"gptq: cannot be dequantised: found gptq, expected fp8 with scales, or"):
        merge(gptq, adapter, tmp_path / "out", dequantize=True)
    with pytest.raises(QuantizedError, match=r"found gptq; merge into the original 16- or 32-bit weights$"):
        merge(gptq, adapter, tmp_path / "out")
    # a plain base is merged as it is
    plain = write_checkpoint(tmp_path / "plain", llama_tensors(), llama_config())
    assert merge(plain, adapter, tmp_path / "plainly", dequantize=True)["notes"] == ["nothing to dequantise: the base is not quantised"]
    assert inspect(base)["warnings"] == [
        "its weights are quantised (fp8): merge takes it with --dequantize alone, and parameters are counted as stored"
    ]
    assert inspect(base)["quantization"] == "fp8" and "merge refuses it" in inspect(gptq)["warnings"][0]
    joined = inspect(adapter, base=base)["warnings"]
    assert any(text.startswith("the base is quantised (fp8): merge takes it with --dequantize alone") for text in joined)


def test_weights_that_bitsandbytes_turned(tmp_path: Path) -> None:
    """Its layers hold a Conv1D's weight the other way round than the plain model: in a square one nothing would show it."""
    tensors = four_bit("transformer.h.0.attn.c_proj.weight", randn(8, 8, seed=1))
    base = write_checkpoint(tmp_path / "base", tensors, {"model_type": "gpt2", "quantization_config": {"load_in_4bit": True}})
    adapter = lora(tmp_path / "adapter", {"transformer.h.0.attn.c_proj": (8, 8)})
    with pytest.raises(QuantizedError, match=r"c_proj\.weight: turned when it was quantised, and the plain model stores it \(in, out\)"):
        merge(base, adapter, tmp_path / "out", dequantize=True)


def test_a_quantised_model_of_a_pipeline(tmp_path: Path) -> None:
    base = pipeline(tmp_path / "base")
    quantised(base / "text_encoder_3", "nf4", tie_word_embeddings=False)
    adapter = lora(tmp_path / "adapter", {"text_encoder_3.model.layers.0.self_attn.q_proj": (8, 8), "unet.mid.attn.to_q": (8, 8)})
    with pytest.raises(QuantizedError, match=r"quantised: found text_encoder_3: bitsandbytes; .* or give --dequantize"):
        merge(base, adapter, tmp_path / "out")
    receipt = merge(base, adapter, tmp_path / "out", dequantize=True)
    assert receipt["applied"] == 2 and receipt["notes"][0] == "text_encoder_3: dequantised (bitsandbytes): 12 weights as BF16"
    assert receipt["changed_files"] == ["text_encoder_3/config.json"]
    assert "quantization_config" not in read_config(tmp_path / "out" / "text_encoder_3")
    assert verify(tmp_path / "out", base=base, adapters=adapter)["ok"]
    assert inspect(base)["quantization"] == "text_encoder_3: bitsandbytes"
    # dequantised although nothing in it changes: half a pipeline would be left quantised
    merge(base, lora(tmp_path / "other", {"unet.mid.attn.to_q": (8, 8)}), tmp_path / "rest", dequantize=True)
    assert read_checkpoint(tmp_path / "rest" / "text_encoder_3").keys() == llama_tensors().keys()


def test_transformers_loads_the_dequantised_copy(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 17}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    base, _ = quantised(tmp_path / "base", "fp8")
    adapter = llama_lora(tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out", dequantize=True)
    LlamaConfig(**sizes, dtype="bfloat16").save_pretrained(tmp_path / "out")
    tensors = read_checkpoint(tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    missing = {name for name in loading["missing_keys"] if "gate_proj" not in name and "post_attention" not in name}  # this Llama has none
    assert not missing and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, tensors["model.layers.0.self_attn.q_proj.weight"])
