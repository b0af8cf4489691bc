"""transformers' own dequantisation of a whole model, beside the plain copy that a merge begins with.

They compute in float32 and round that to bfloat16. Where the first rounding lands on a tie of the second, one weight in 2**16,
theirs can be the other neighbour of what both are near.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import merge
from tests.files import fp8_blocks, raw, read_checkpoint, write_checkpoint
from tests.ops._bases import lora

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
MODULE = "model.layers.0.self_attn.q_proj"


def small_llama(folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, vocab_size=64)).bfloat16()
    model.save_pretrained(folder)
    return model


def check(base: Path, expected: dict[str, Tensor], tmp_path: Path) -> None:
    """At strength 0 the output is the dequantised model; a merge is that of the plain copy."""
    adapter = lora(tmp_path / "adapter", {MODULE: (128, 128)})
    merge(base, f"{adapter}:0", tmp_path / "copy", dequantize=True)
    found = read_checkpoint(tmp_path / "copy")
    assert found.keys() == expected.keys()
    apart = {name: int((found[name] != expected[name]).sum()) for name in found}
    assert sum(apart.values()) <= 8  # of 160 thousand
    for name in found:
        beside = [torch.nextafter(expected[name], torch.full_like(expected[name], end)) for end in (-torch.inf, torch.inf)]
        assert ((found[name] == expected[name]) | (found[name] == beside[0]) | (found[name] == beside[1])).all()
    for start, out, option in ((base, "merged", True), (tmp_path / "copy", "plainly", False)):
        merge(start, adapter, tmp_path / out, dequantize=option)
    merged, plainly = read_checkpoint(tmp_path / "merged"), read_checkpoint(tmp_path / "plainly")
    assert {name: raw(tensor) for name, tensor in merged.items()} == {name: raw(tensor) for name, tensor in plainly.items()}
    assert raw(merged[f"{MODULE}.weight"]) != raw(found[f"{MODULE}.weight"])


def test_fp8_in_blocks(tmp_path: Path) -> None:
    model = small_llama(tmp_path / "plain")
    tensors = {}
    for name, W in model.state_dict().items():
        tensors[name] = W
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = fp8_blocks(W.float())
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    base = write_checkpoint(tmp_path / "base", tensors, config)
    how = transformers.FineGrainedFP8Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.bfloat16)
    check(base, {name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes(tmp_path: Path, kind: str, nested: bool) -> None:
    pytest.importorskip("bitsandbytes")
    small_llama(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.bfloat16
    )
    words = {"device_map": "cpu", "dtype": torch.bfloat16}
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=how, **words)
    quantised.save_pretrained(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **words).dequantize()
    check(tmp_path / "base", {name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path)
