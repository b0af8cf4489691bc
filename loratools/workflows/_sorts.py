"""What sort of model a tensor's name is that of: a language model, a part of a diffusion pipeline, a tower of a multimodal one.

Names alone tell it, in the spellings of transformers, of the authors' files, of diffusers and, flat, of kohya. A name that several
sorts have (`score`, `blocks.0.mlp`) is of none.
"""

from __future__ import annotations

import re

from loratools.flatnames import split_prefix

SORTS = ("language", "diffusion", "tower", "text encoder", "vision")

# the first that finds something has the name
_MARKS = tuple(
    (sort, re.compile(pattern))
    for sort, pattern in (
        # the parts of a pipeline, in folders, single files and adapters
        ("diffusion", r"^(unet|prior|controlnet|vae|(model\.)?diffusion_model|cond_stage_model|conditioner|first_stage_model)\."),
        ("diffusion", r"^text_encoders?(_\d)?\."),
        # the blocks of UNets and of diffusion transformers, and their attentions
        ("diffusion", r"(^|\.)(down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)\."),
        ("diffusion", r"(^|\.)((single_)?transformer_blocks|(double|single)(_stream)?_blocks|joint_blocks|(noise|context)_refiner)\.\d"),
        ("diffusion", r"(^|\.)(attn\d?|attention|self_attn|cross_attn|processor)\.(to_[qkv]|to_out|to_add_out|add_[qkv]_proj|to_qkv)\b"),
        ("diffusion", r"(^|\.)layers\.\d+\.attention\.(qkv|out)\."),
        ("diffusion", r"(^|\.)blocks\.\d+\.((self|cross)_attn\.([qkvo]|[kv]_img)|ffn\.\d)\."),
        # the encoders beside a multimodal model's language model
        ("tower", r"(^|\.)(visual|vision_(tower|model|encoder)|image_encoder|(audio|speech)_(tower|encoder)|aligner|vpm|resampler)\."),
        ("tower", r"(^|\.)(multi_?modal_projector|mm_projector|embed_(vision|audio)|vision_language_adapter|connector)\."),
        ("text encoder", r"(^|\.)text_model\.(encoder|embeddings|final_layer_norm)\."),
        # as transformers 5 has CLIP; of BART and Whisper these lie under model.
        ("text encoder", r"^encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12]|layer_norm[12])\."),
        # image models: ViT of transformers and of timm, Swin, ConvNeXt, ResNet
        ("vision", r"(^|\.)blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12]|norm[12])\."),
        ("vision", r"(^|\.)(encoder\.)?layer\.\d+\.(attention\.(attention|[qkvo]_proj)|layer_scale|mlp\.(up|down)_proj)\b"),
        ("vision", r"(^|\.)(stages|layers)\.\d+\.(layers|blocks)\.\d+\."),
        ("vision", r"(^|\.)(patch_embed(dings?)?|(vit|dinov\d\w*|swin\w*|convnext\w*|deit|beit|resnet|segformer)\.\w+)\."),
        # decoders, encoders and both
        ("language", r"(^|\.)(layers|h|gpt_neox\.layers|block|blk)\.\d+\.(self_)?(attn|attention|mlp|mixer|mamba|linear_attn|ln_[12])\b"),
        ("language", r"(^|\.)layers\.\d+\.(block_sparse_moe|feed_forward\.\w*_proj|moe|ffn|encoder_attn|fc[12]|post_\w+|\w*norm)\b"),
        ("language", r"(^|\.)layers\.\d+\.(router|experts|shared_experts?|conv|time_mix|channel_mix)\b"),
        ("language", r"(^|\.)(encoder|decoder)\.block\.\d+\.layer\.\d+\."),
        ("language", r"(^|\.)encoder\.layer\.\d+\.(attention\.(self|output)|intermediate|output)\b"),
        ("language", r"(^|\.)(transformer\.layer\.\d+\.(attention|ffn)|blk\.\d+\.(attn|ffn|ssm)_\w+)\b"),
        ("language", r"(^|\.)blocks\.\d+\.(attn\.Wqkv|attn\.out_proj|ffn\.(up|down)_proj|att|ffn\.(key|value|receptance)|attention)\b"),
        ("language", r"(^|\.)(lm_head|embed_tokens|wte|wpe|embed_out|embed_in|word_embeddings|tok_embeddings|ln_f)\b"),
    )
)  # fmt: skip


def sort_of(name: str) -> str | None:
    """The sort of model that has a tensor of this name, one of SORTS; None where the name does not tell.

    >>> sort_of("model.layers.0.self_attn.q_proj.weight"), sort_of("lora_unet_mid_block_attentions_0_proj_in.weight")
    ('language', 'diffusion')
    >>> sort_of("score.weight")
    """
    module = name.rpartition(".")[0] or name
    if "." not in module:
        flat = split_prefix(module)
        if flat is not None:
            return "diffusion"
    return next((sort for sort, mark in _MARKS if mark.search(name)), None)
