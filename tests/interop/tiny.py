"""Tiny models whose names in memory are others than in older files, with both names of each tensor by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import conversion_mapping, core_model_loading

TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4,
}  # fmt: skip
CLIP_TEXT = {key: TEXT[key] for key in TEXT if key not in ("num_key_value_heads", "head_dim", "max_position_embeddings")}
CLIP_TEXT |= {"max_position_embeddings": 16}
SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1],
    "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8,
}  # fmt: skip


def _llava() -> nn.Module:
    vision, text = VISION | {"model_type": "clip_vision_model"}, TEXT | {"model_type": "llama"}
    return t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))


def _gemma3() -> nn.Module:
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4}
    config = t.Gemma3Config(vision_config=dict(VISION), text_config=TEXT | {"sliding_window": 8}, **tokens)
    return t.Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    return t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision))


def _gpt_neox() -> nn.Module:
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**CLIP_TEXT))


def _dinov2() -> nn.Module:
    return t.Dinov2ForImageClassification(t.Dinov2Config(**{k: VISION[k] for k in VISION if k != "intermediate_size"}, num_labels=3))


def _qwen3_vl_moe(width: int = 12) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    experts = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": width, "decoder_sparse_step": 1}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 4, "patch_size": 4, "out_hidden_size": 16}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = t.Qwen3VLMoeConfig(text_config=TEXT | experts | {"rope_parameters": rope}, vision_config=vision)
    return t.Qwen3VLMoeForConditionalGeneration(config)


def _nomic_bert() -> nn.Module:
    return t.NomicBertModel(t.NomicBertConfig(**CLIP_TEXT))


# how each is made, and modules of every kind that LoRA is put on
MODELS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "llava": (_llava, r".*\.(q_proj|up_proj|fc1|linear_1)"),
    "gemma3": (_gemma3, r".*\.(q_proj|down_proj|fc2)"),
    "qwen2_vl": (_qwen2_vl, r".*\.(q_proj|up_proj|qkv|fc1)"),
    "gpt_neox": (_gpt_neox, r".*(query_key_value|dense_h_to_4h|lm_head)"),
    "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=3)), r".*(q_proj|o_proj|fc1|fc2)"),
    "dinov2": (_dinov2, r".*(q_proj|v_proj|o_proj|fc1)"),
    "beit": (lambda: t.BeitForImageClassification(t.BeitConfig(**VISION, num_labels=3)), r".*(q_proj|v_proj|o_proj|fc2)"),
    "clip_text": (lambda: t.CLIPTextModel(t.CLIPTextConfig(**CLIP_TEXT)), r".*(q_proj|fc1)"),
    "segformer": (lambda: t.SegformerForImageClassification(t.SegformerConfig(**SEGFORMER)), r".*(q_proj|v_proj|o_proj|fc1)"),
    "qwen3_vl_moe": (_qwen3_vl_moe, r".*q_proj"),
    "nomic_bert": (_nomic_bert, r".*(q_proj|o_proj)"),
}
RENAMED = [kind for kind in MODELS if kind not in ("qwen3_vl_moe", "nomic_bert")]


def new(kind: str, seed: int = 0, **more: Any) -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(seed)
    model = MODELS[kind][0](**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def old_names(model: nn.Module) -> dict[str, str]:
    """Each tensor's name in memory and in an older file: transformers' renamings reversed, prefixes that it only takes off included."""
    transforms = conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    reverse = [transform.reverse_transform() for transform in transforms[::-1]]
    renamings = [item for item in reverse if isinstance(item, core_model_loading.WeightRenaming)]
    return {name: core_model_loading.apply_renamings(name, renamings) for name in model.state_dict()}


def save(model: nn.Module, folder: Path, names: dict[str, str] | None = None) -> Path:
    """The model's folder, its tensors under other names than in memory where they are given."""
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]  # type: ignore[union-attr]
    model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    tensors: dict[str, Tensor] = {(names or {}).get(name, name): tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path) -> nn.Module:
    """What transformers makes of a folder; nothing may be missing or left over."""
    kind = getattr(t, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, said = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not said["missing_keys"] and not said["unexpected_keys"], said
    return model.eval()
