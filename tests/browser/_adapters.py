"""Adapters to make reports of: like trained ones, with spectra that fall and layers that differ, and small enough to be quick."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.files import peft_config, write_adapter, write_checkpoint

WIDTH = 64
MODULES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH // 4, WIDTH), "self_attn.v_proj": (WIDTH // 4, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (3 * WIDTH, WIDTH), "mlp.up_proj": (3 * WIDTH, WIDTH),
    "mlp.down_proj": (WIDTH, 3 * WIDTH),
}  # fmt: skip


def shapes(layers: int, modules: int = 7) -> dict[str, tuple[int, int]]:
    """The weights of the first so many modules of each layer of a Llama."""
    listed = list(MODULES.items())[:modules]
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in listed}


def model(folder: Path, layers: int) -> Path:
    """A base with these modules, an embedding and a head."""
    generator = torch.Generator().manual_seed(0)
    ends = {"model.embed_tokens": (256, WIDTH), "lm_head": (256, WIDTH)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=generator) / 8 for name, shape in (shapes(layers) | ends).items()}
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 3 * WIDTH, "tie_word_embeddings": False,
    }  # fmt: skip
    return write_checkpoint(folder, tensors, config)


def adapter(folder: Path, layers: int, *, rank: int = 8, seed: int = 1, modules: int = 7, near: int | None = None) -> Path:
    """LoRA on all of them; `near` is the seed of another adapter whose change is a part of it."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(layers, modules).items():
        A, B = _factors(name, shape, rank, layers, seed)
        if near is not None:
            also_A, also_B = _factors(name, shape, rank, layers, near)
            A, B = torch.cat([A, also_A]), torch.cat([0.6 * B, 0.8 * also_B], dim=1)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    targets = [name.partition(".")[2] for name in list(MODULES)[:modules]]
    rank *= 1 if near is None else 2
    config = peft_config(r=rank, lora_alpha=2 * rank, target_modules=targets, base_model_name_or_path="example/tiny-llama")
    return write_adapter(folder, tensors, config)


def dora(folder: Path, layers: int, base: dict[str, Tensor], *, rank: int = 4, seed: int = 5) -> Path:
    """DoRA on all of them, each magnitude a little off the base's norm."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(layers).items():
        A, B = _factors(name, shape, rank, layers, seed)
        moved = 1 + 0.05 * torch.randn(shape[0], generator=torch.Generator().manual_seed(len(name) + seed))
        root = f"base_model.model.{name}"
        norms = torch.linalg.vector_norm(base[f"{name}.weight"], dim=1)
        tensors |= {f"{root}.lora_A.weight": A, f"{root}.lora_B.weight": B, f"{root}.lora_magnitude_vector": norms * moved}
    targets = [name.partition(".")[2] for name in MODULES]
    return write_adapter(folder, tensors, peft_config(r=rank, lora_alpha=2 * rank, target_modules=targets, use_dora=True))


def _factors(name: str, shape: tuple[int, int], rank: int, layers: int, seed: int) -> tuple[Tensor, Tensor]:
    """Factors whose product has falling singular values, and is larger in the middle of the model and in its MLPs."""
    layer = int(name.split(".")[2])
    generator = torch.Generator().manual_seed(1000 * seed + 31 * layer + sum(map(ord, name)))
    size = 0.02 * (1 + 2.5 * torch.tensor(layer / layers * 3.1).sin().item()) * (1.6 if "mlp" in name else 1.0)
    fall = torch.arange(rank).mul(-0.35).exp()
    A = torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5
    B = torch.randn(shape[0], rank, generator=generator) * fall * size
    return A, B
