"""Whose modules names are: spellings of transformers, of the authors' files, of diffusers and kohya, and names that tell nothing."""

from __future__ import annotations

import pytest

from loratools.workflows._sorts import SORTS, sort_of

NAMES = {
    "language": """
        model.layers.0.self_attn.q_proj layers.3.mlp.gate_proj transformer.h.0.attn.c_attn h.1.mlp.c_fc
        transformer.h.0.self_attention.query_key_value gpt_neox.layers.0.attention.query_key_value model.decoder.layers.0.fc1
        model.encoder.layers.0.self_attn.q_proj encoder.block.0.layer.0.SelfAttention.q bert.encoder.layer.0.attention.self.query
        roberta.encoder.layer.3.output.dense distilbert.transformer.layer.0.attention.q_lin model.language_model.layers.0.self_attn.q_proj
        language_model.model.layers.0.mlp.up_proj model.layers.0.block_sparse_moe.experts.0.w1 backbone.layers.0.mixer.in_proj
        transformer.blocks.0.attn.Wqkv layers.0.attention.wq model.embed_tokens lm_head transformer.wte model.layers.0.input_layernorm
        model.layers.0.mlp.gate blocks.0.att.key thinker.model.layers.0.self_attn.q_proj model.layers.2.mlp.experts.3.down_proj
        """,
    "diffusion": """
        unet.down_blocks.0.attentions.0.proj_in down_blocks.0.resnets.0.conv1 text_encoder.text_model.encoder.layers.0.self_attn.q_proj
        text_encoder_2.encoder.block.0.layer.0.SelfAttention.q transformer.transformer_blocks.0.attn.to_q transformer.blocks.0.attn1.to_q
        transformer.layers.0.attention.to_q layers.0.attention.qkv transformer_blocks.0.ff.net.0.proj double_blocks.0.img_attn.qkv
        diffusion_model.blocks.0.self_attn.q blocks.0.cross_attn.k_img blocks.0.ffn.0 model.diffusion_model.input_blocks.1.1.proj_in
        lora_unet_blocks_0_self_attn_q lycoris_transformer_blocks_0_attn_to_q lora_te2_text_projection single_blocks.3.linear1
        """,
    "tower": """
        visual.blocks.0.attn.qkv model.visual.blocks.0.attn.qkv vision_tower.vision_model.encoder.layers.0.self_attn.q_proj
        thinker.audio_tower.layers.0.self_attn.q_proj model.multi_modal_projector.linear_1 image_encoder.blocks.0.attn.qkv
        """,
    "text encoder": "text_model.encoder.layers.0.self_attn.q_proj encoder.layers.0.mlp.fc1 encoder.layers.11.self_attn.out_proj",
    "vision": """
        blocks.0.attn.qkv vit.encoder.layer.0.attention.attention.query encoder.layer.0.attention.attention.query
        swin.encoder.layers.0.blocks.0.attention.self.query encoder.stages.0.layers.0.dwconv model.stages.2.layers.5.pointwise_conv1
        stages.0.blocks.0.mlp.fc1
        """,
}  # fmt: skip
NONE = "score classifier model.norm proj_out x_embedder conv_in q_proj"


@pytest.mark.parametrize("sort", SORTS)
def test_names_tell_the_sort(sort: str) -> None:
    assert {name: sort_of(f"{name}.weight") for name in NAMES[sort].split()} == dict.fromkeys(NAMES[sort].split(), sort)


def test_names_that_several_have_tell_none() -> None:
    assert {name: sort_of(f"{name}.weight") for name in NONE.split()} == dict.fromkeys(NONE.split())
