"""Live peft loads what extract wrote: its forward on the base is the forward of the merged model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from loratools.ops.extract import extract
from loratools.ops.merge import merge

TOKENS = torch.tensor([[1, 5, 9, 2, 7, 3]])
PIXELS = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(vocab_size=60, max_position_embeddings=16, **sizes))


def llama(**more: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=60, max_position_embeddings=16, **sizes, **more))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type="basic", num_labels=5, **sizes))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "bert": (bert, {"input_ids": TOKENS}),
    "llama": (llama, {"input_ids": TOKENS}),
    "llama tied": (lambda: llama(tie_word_embeddings=True), {"input_ids": TOKENS}),
    "gpt2 tied": (gpt2, {"input_ids": TOKENS}),
    "resnet": (resnet, {"pixel_values": PIXELS}),
}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model.eval()(**inputs)
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state).double()


def perturb(model: nn.Module) -> None:
    """Move every tensor, buffers of batch norms too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if "running" in name)]:
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator).abs()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 2, "dtype": "float16", "alpha": 8}, {"energy": 0.6}, {"size": "24kB"}])
def test_peft_on_the_base_is_the_merged_model(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    if name == "resnet":
        options = options | ({"size": "12kB"} if "size" in options else {})
    model.save_pretrained(tmp_path / "base")
    before = output(model, inputs)
    perturb(model)
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", **options)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert receipt["applied"] == receipt["expected"]
    merged = output(type(model).from_pretrained(tmp_path / "merged"), inputs)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    assert not [str(warning.message) for warning in told if "adapter keys" in str(warning.message)]  # missing or unexpected ones
    live = output(loaded, inputs)
    # both are float32 forwards of a few layers; merging rounds each weight once more
    assert float((live - merged).norm()) <= 1e-5 * float(merged.norm())
    # and the adapter does something
    assert float((merged - before).norm()) > 1e-2 * float(before.norm())
