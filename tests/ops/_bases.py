"""Adapters and comparisons for tests of the operations on bases of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.files import llama_config, llama_tensors, peft_config, raw, read_checkpoint, write_adapter, write_pipeline
from tests.strategies import randn

ROOT = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def lora(folder: Path, names: dict[str, tuple[int, int]], extra: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A rank 2 peft adapter of the modules with these shapes, and tensors saved whole."""
    tensors = {f"{ROOT}{name}": tensor for name, tensor in (extra or {}).items()}
    for seed, (name, (rows, columns)) in enumerate(names.items()):
        tensors[f"{ROOT}{name}.lora_A.weight"] = randn(2, columns, seed=seed)
        tensors[f"{ROOT}{name}.lora_B.weight"] = randn(rows, 2, seed=seed + 100)
    return write_adapter(folder, tensors, peft_config(target_modules=sorted(names) or ["none"]) | config)


def llama_lora(folder: Path) -> Path:
    return lora(folder, {f"model.layers.{layer}.self_attn.{name}": (8, 8) for layer in (0, 1) for name in ("q_proj", "o_proj")})


def same(one: Path, other: Path) -> bool:
    a, b = read_checkpoint(one), read_checkpoint(other)
    return {name: raw(tensor) for name, tensor in a.items()} == {name: raw(tensor) for name, tensor in b.items()}


UNET = {"mid.attn.to_q.weight": randn(8, 8, seed=1), "mid.attn.to_k.weight": randn(8, 8, seed=2), "conv.weight": randn(4, 3, 3, 3, seed=3)}
CLIP = {f"text_model.layers.{layer}.q_proj.weight": randn(8, 8, seed=layer) for layer in (0, 1)}


def pipeline(folder: Path) -> Path:
    models = {
        "unet": (UNET, {"_class_name": "UNet2DConditionModel"}),
        "vae": ({"conv.weight": randn(4, 3, 3, 3, seed=9)}, {"_class_name": "AutoencoderKL"}),
        "text_encoder": (CLIP, {"model_type": "clip_text_model"}),
        "text_encoder_2": (CLIP | {"text_projection.weight": randn(4, 8, seed=5)}, {"model_type": "clip", "torch_dtype": "float32"}),
        "text_encoder_3": (llama_tensors(head=False), llama_config(tie_word_embeddings=True)),
    }
    return write_pipeline(folder, models)
