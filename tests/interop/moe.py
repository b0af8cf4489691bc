"""Tiny models with experts, each with the parameters that peft may put LoRA on, saved as transformers saves them.

The oracle is peft's own: its forward on the loaded model, and `merge_and_unload`, whose weights are compared expert by expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "max_position_embeddings": 32, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = 4


@dataclass(frozen=True)
class Model:
    """A model's config, the module of its experts within a layer, and their width."""

    config: Callable[..., Any]
    settings: dict[str, Any]
    experts: str = "mlp.experts"
    width: str = "intermediate_size"
    make: Callable[[Any], nn.Module] = AutoModelForCausalLM.from_config

    def new(self, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
        """The model with random weights of that dtype."""
        torch.manual_seed(seed)
        model = self.make(self.config(**{**SIZES, **self.settings, **more})).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        return model

    def targets(self, *names: str) -> list[str]:
        return [f"{self.experts}.{name}" for name in names or ("gate_up_proj", "down_proj")]


MODELS = {
    "mixtral": Model(MixtralConfig, {"intermediate_size": 12, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen2_moe": Model(
        Qwen2MoeConfig,
        {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 8, "num_experts": EXPERTS, "num_experts_per_tok": 2},
        width="moe_intermediate_size",
    ),
    "qwen3_moe": Model(
        Qwen3MoeConfig,
        {"moe_intermediate_size": 12, "num_experts": EXPERTS, "num_experts_per_tok": 2},
        width="moe_intermediate_size",
    ),
    "deepseek_v3": Model(
        DeepseekV3Config,
        {
            "moe_intermediate_size": 12, "intermediate_size": 20, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
            "v_head_dim": 4, "num_key_value_heads": 4, "n_shared_experts": 1,
        },
        width="moe_intermediate_size",
    ),
    "gpt_oss": Model(
        GptOssConfig,
        {"intermediate_size": 12, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "llama4": Model(
        Llama4TextConfig,
        {
            "intermediate_size": 12, "intermediate_size_mlp": 20, "num_local_experts": EXPERTS, "num_experts_per_tok": 1,
            "moe_layers": [0, 1], "attention_chunk_size": 16,
        },
        experts="feed_forward.experts",
        make=Llama4ForCausalLM,
    ),
    "nemotron_h": Model(
        NemotronHConfig,
        {
            "layers_block_type": ["moe", "attention", "moe"], "num_hidden_layers": 3, "moe_intermediate_size": 12,
            "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 8,
            "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "moe_latent_size": None,
        },
        experts="mixer.experts",
        width="moe_intermediate_size",
    ),
}  # fmt: skip


def save(model: nn.Module, folder: Path, *, on_disk: bool = True) -> Path:
    """The model as transformers saves it: under the names it has on disk, or those in memory."""
    model.save_pretrained(folder, save_original_format=on_disk)  # type: ignore[operator]
    return folder


def wrap(model: nn.Module, folder: Path, seed: int = 1, **config: Any) -> PeftModel:
    """The model under a random adapter of rank 3 that changes its weights by about their own size, saved by peft."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False} | config
    wrapped = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def tokens(seed: int = 3) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits.double()


def loaded(folder: Path, like: Model) -> nn.Module:
    """What transformers makes of a folder; nothing may be missing in it or left over."""
    kind = Llama4ForCausalLM if like.make is Llama4ForCausalLM else AutoModelForCausalLM
    model, said = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
    return model.eval()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def worst_expert(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ of any matrix, those of a stack one by one."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        pairs = zip(found[name], tensor, strict=True) if tensor.ndim == 3 else [(found[name], tensor)]
        worst = max(worst, *(distance(one.double(), other.double()) for one, other in pairs))
    return worst


def renumbered(tensors: Mapping[str, Tensor], pattern: str, new: str) -> dict[str, Tensor]:
    """The tensors with every key changed by a regular expression."""
    return {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
