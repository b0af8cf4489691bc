"""Tiny models of the diffusion networks beyond Flux, SD3 and Stable Diffusion, as diffusers builds them, by the table's names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

diffusers = pytest.importorskip("diffusers")
HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2}


def krea2() -> nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16,
        timestep_embed_dim=8, text_hidden_dim=8, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=8, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


BEYOND: dict[str, Callable[[], nn.Module]] = {
    "hunyuan-video": lambda: diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=2, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4), **HEADS,
    ),
    "chroma": lambda: diffusers.ChromaTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=8, axes_dims_rope=(2, 2, 4), approximator_num_channels=8,
        approximator_hidden_dim=8, approximator_layers=2, **HEADS,
    ),
    "flux2": lambda: diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, joint_attention_dim=8, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
        **HEADS,
    ),
    "qwen-image": lambda: diffusers.QwenImageTransformer2DModel(
        num_layers=2, joint_attention_dim=8, in_channels=4, out_channels=1, axes_dims_rope=(2, 2, 4), **HEADS
    ),
    "wan": lambda: diffusers.WanVACETransformer3DModel(
        in_channels=4, out_channels=4, image_dim=8, added_kv_proj_dim=24, vace_layers=[0, 1], vace_in_channels=4, **WAN
    ),
    "z-image": lambda: diffusers.ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=8, in_channels=4, axes_dims=[4, 6, 6]
    ),
    "lumina2": lambda: diffusers.Lumina2Transformer2DModel(
        in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=2, num_attention_heads=6, num_kv_heads=2, multiple_of=2,
        axes_dim_rope=(2, 2, 0), cap_feat_dim=8,
    ),
    "krea2": krea2,
    "cosmos2": lambda: diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, text_embed_dim=8, adaln_lora_dim=4,
        extra_pos_embed_type=None, max_size=(4, 8, 8),
    ),
    "ltx": lambda: diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=16, num_layers=2, caption_channels=8, **HEADS
    ),
    "auraflow": lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=4, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=8, caption_projection_dim=16, pos_embed_max_size=4,
        **HEADS,
    ),
    "sana": lambda: diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
        caption_channels=8, sample_size=4, **HEADS,
    ),
    "hidream": lambda: diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, caption_channels=[8, 8], text_emb_dim=8,
        axes_dims_rope=(4, 4), llama_layers=[0, 0], **HEADS,
    ),
}  # fmt: skip
# what a file of the authors has in another shape, so that the table leaves it aside
RESHAPED = r"transformer_blocks\.\d+\.scale_shift_table"
