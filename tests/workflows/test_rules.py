"""Every rule of every target beside an adapter that breaks it and one that does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loratools.adapter import Adapter
from loratools.deltas.experts import Experts
from loratools.deltas.full import Replacement
from loratools.workflows._checking import strikes
from loratools.workflows._subject import Subject
from loratools.workflows.targets import Rule, names, target_of
from tests.workflows._adapters import BLOCK, IMAGES, NAMES, Q, V, low, made_for, of, of_images, ref

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "init_lora_weights": True}
# but the rule that asks the base's model_type, which has a test of its own
RULES = [(name, rule) for name in names() for rule in target_of(name).rules if rule.id != "fused_experts"]
LAYER = "model.layers.0."
Made = Callable[[str], Subject]


def subject(name: str, made: Adapter, **more: Any) -> Subject:
    return Subject(made, target_of(name).reads, **more)


def made(word: str, format: str | None = None, **more: Any) -> Made:
    """An adapter of MADE of a model that the target runs, as if from a file of that format."""
    return lambda name: subject(name, replace(made_for(name, word), format=format), **more)


def read(word: str, **config: Any) -> Made:
    """As if from a peft folder whose config says more."""
    return made(word, "peft", config=CONFIG | config)


def keyed(*keys: str, format: str = "peft") -> Made:
    """As if from a file with these keys."""
    return made("plain", format, config=CONFIG if format == "peft" else None, keys=keys)


def named(*tensors: str, format: str | None = None, layer: str = "linear") -> Made:
    """LoRA on tensors of these names."""
    return lambda name: subject(name, Adapter({tensor: replace(low(), layer=layer) for tensor in tensors}, format=format))


def of_another(name: str) -> Subject:
    """Of a model that the target does not run."""
    return subject(name, of() if name in IMAGES else of_images(of()))


def whole(*tensors: str) -> Made:
    return lambda name: subject(name, Adapter({**of(), **{tensor: Replacement(value=ref(8, 8)) for tensor in tensors}}))


def experts(*words: str) -> Made:
    """LoRA of fused experts, flat as peft has it."""
    stack = Experts(A=ref(4, 8), B=ref(8, 4), alpha=2.0, experts=2)
    return lambda name: subject(name, Adapter({f"{LAYER}mlp.experts.{word}": stack for word in words}))


# what breaks each rule, by its name, or by its target's and its own where targets differ
BREAKING: dict[str, Made] = {
    "format": made("plain", "loratools"),
    "network": of_another,
    "tower": named(Q, "model.visual.blocks.0.attn.qkv.weight"),
    "architecture": named("transformer.h.0.attn.c_attn.weight"),
    "root": named("layers.0.self_attn.q_proj.weight"),
    "gpt2": named("transformer.h.0.attn.c_attn.weight", layer="transposed"),
    "neox": named("gpt_neox.layers.0.attention.dense.weight"),
    "modules": named("model.decoder.layers.0.fc1.weight"),
    "joined": named(Q),
    "dora": made("dora"),
    "comfyui dora": made("dora"),
    "dora_scale": made("dora", "kohya"),
    "axis": made("dora in"),
    "mixed": made("dora"),
    "initial": made("pissa"),
    "init_lora_weights": read("plain", init_lora_weights="PiSSA_niter_4"),
    "variant": read("plain", use_qalora=True),
    "kind": made("loha"),
    "comfyui kind": made("scaled"),
    "rotation": made("rotated"),
    "metadata": made("plain", "diffusers"),
    "magnitude": made("dora", "diffusers"),
    "lora_bias": made("bias", "diffusers"),
    "modules_to_save": read("saved", modules_to_save=["score"]),
    "patterns": read("patterns", rank_pattern={"q_proj": 4}),
    "saved": made("saved"),
    "saved_layer": whole(Q),
    "vocabulary_saved": whole("model.embed_tokens.weight"),
    "vocabulary_keys": keyed("base_model.model.lm_head.weight"),
    "copy": keyed("base_model.model.model.embed_tokens.base_layer.weight"),
    "rows": made("rows"),
    "bias": made("bias"),
    "bias_setting": read("plain", bias="all"),
    "norm": made("norm"),
    "vector": made("norm"),
    "convolution": made("conv"),
    "embedding": made("embedding"),
    "sglang embedding": named("transformer.wpe.weight", layer="embedding"),
    "vocabulary": made("embedding"),
    "head": made("head"),
    "position": named("model.decoder.embed_positions.weight", layer="embedding"),
    "required": read("plain", r=None),
    "target_modules": read("plain", target_modules=r".*\.(q|v)_proj"),
    "names": keyed("base_model.model.q_proj.lora_A.mine.weight"),
    "wrappers": keyed("base_model.model._orig_mod.q_proj.lora_A.weight"),
    "prefix": keyed("model.layers.0.self_attn.q_proj.lora_A.weight"),
    "kohya prefix": named("lycoris_mid_block_attentions_0_proj_in.weight", format="kohya"),
    "diffusers prefix": named("lora_te3_encoder_block_0_layer_0_SelfAttention_q.weight", format="kohya"),
    "spelling": named("lora_unet_single_transformer_blocks_0_attn_to_q.weight", format="kohya"),
    "places": named("lora_unet_conv_in.weight", format="kohya"),
    "clip": named("lora_te_encoder_layers_0_self_attn_q_proj.weight", format="kohya"),
    "layout": named("diffusion_model.down_blocks.0.attentions.0.proj_in.weight", format="comfyui"),
    "diffusers layout": named("transformer.double_blocks.0.img_attn.qkv.weight", format="diffusers"),
    "attention": keyed(f"{BLOCK}attn1.to_q.lora_A.weight", format="diffusers"),
    "text_encoder": named("lora_te_text_model_encoder_layers_0_layer_norm1.weight", format="kohya"),
    "original": named("diffusion_model.double_blocks.0.img_attn.qkv.weight", format="comfyui"),
    "ltx": keyed("diffusion_model.transformer_blocks.0.attn1.to_q.alpha", format="comfyui"),
    "parts": keyed("transformer_blocks.0.attn.to_q.lora_A.weight", format="diffusers"),
    "diffusers alpha": keyed(f"{BLOCK}attn1.to_q.alpha", format="diffusers"),
    "alpha": read("plain", lora_alpha=None),
    "zero": lambda name: subject(name, Adapter({Q: low(alpha=0.0)})),
    "scale": made("patterns"),
    "sglang scale": read("rslora", use_rslora=True),
    "llama.cpp scale": read("rslora", use_rslora=True),
    "rank": made("patterns"),
    "vllm rank": made("high rank"),
    "rank_pattern": read("patterns", rank_pattern={"q_proj": 4}),
    "default_rank": made("high rank"),
    "experts": experts("gate_up_proj", "down_proj"),
    "vllm experts": experts("gate_up_proj"),
    "perhaps_fused": experts("gate_up_proj", "down_proj"),
    "passengers": made("passengers"),
    "tied": made("head", heads=frozenset({NAMES["head"]})),
    "tied_embedding": made("embedding", tied=frozenset({NAMES["embedding"]})),
}  # fmt: skip
KEEPING: dict[str, Made] = {
    "format": lambda name: subject(name, replace(of(), format=target_of(name).reads[0])),
    "architecture": named("transformer.h.0.mlp.w1.weight"),
    "vllm root": lambda name: Subject(
        Adapter({"layers.0.self_attn.q_proj.weight": low()}), ("peft",), config=CONFIG | {"task_type": "FEATURE_EXTRACTION"}
    ),
    "gpt2": named("transformer.h.0.attn.c_attn.weight"),
    "joined": named(Q, V),
    "comfyui dora": made("dora in"),
    "dora_scale": made("dora", "diffusers"),
    "magnitude": made("dora", "kohya"),
    "lora_bias": made("bias", "kohya"),
    "comfyui kind": made("loha"),
    "comfyui saved": lambda name: subject(name, Adapter({"diffusion_model.out.0.weight": Replacement(value=ref(8, 8))})),
    "axis": made("dora on all"),
    "mixed": made("dora on all"),
    "init_lora_weights": read("plain", init_lora_weights="Gaussian"),
    "bias_setting": read("plain", lora_bias=False),
    "saved": whole("model.embed_tokens.weight"),
    "sglang saved": whole(Q),
    "diffusers saved": made("plain"),
    "kohya saved": made("plain"),
    "mlx saved": made("plain"),
    "llama.cpp saved": made("plain"),
    "saved_layer": made("saved"),
    "vocabulary_saved": made("saved"),
    "copy": keyed("base_model.model.model.embed_tokens.lora_embedding_A"),
    "patterns": read("plain", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4}),
    "metadata": made("patterns", "kohya"),
    "norm": made("bias"),
    "llama.cpp bias": made("norm"),
    "sglang embedding": made("embedding"),
    "head": made("embedding"),
    "required": read("plain"),
    "target_modules": read("plain", target_modules="all-linear"),
    "vocabulary_keys": keyed("base_model.model.model.embed_tokens.lora_embedding_A"),
    "names": keyed("base_model.model.q_proj.lora_A.weight"),
    "peft names": keyed("base_model.model.q_proj.lora_A.default.weight", "base_model.model.e.lora_embedding_A.default"),
    "wrappers": keyed("base_model.model.q_proj.lora_A.weight"),
    "prefix": keyed("base_model.model.q_proj.lora_A.weight"),
    "kohya prefix": named("lora_te3_encoder_block_0_layer_0_SelfAttention_q.weight", format="kohya"),
    "diffusers prefix": named("lora_transformer_transformer_blocks_0_attn_to_q.weight", format="kohya"),
    "spelling": named("lora_unet_transformer_blocks_0_attn_to_q.weight", format="kohya"),  # Qwen-Image's own name
    "places": named("lora_unet_mid_block_proj_in.weight", "lora_te2_text_model_encoder_layers_0_mlp_fc1.weight", format="kohya"),
    "clip": named("lora_te_text_model_encoder_layers_0_self_attn_q_proj.weight", "lora_te3_encoder_block_0_layer_0_SelfAttention_q.weight"),
    "layout": named("diffusion_model.input_blocks.1.1.proj_in.weight", format="comfyui"),
    "attention": keyed(f"{BLOCK}attn1.processor.to_q_lora.down.weight", f"{BLOCK}ff.net.0.proj.lora_A.weight", format="diffusers"),
    "text_encoder": named("lora_te_text_model_encoder_layers_0_self_attn_q_proj.weight", format="kohya"),
    "original": named(
        "diffusion_model.blocks.0.self_attn.q.weight", "diffusion_model.layers.0.attention.to_q.weight",
        "diffusion_model.transformer_blocks.0.attn.to_q.weight", format="comfyui",
    ),
    "ltx": keyed("diffusion_model.transformer_blocks.0.attn.to_q.alpha", format="comfyui"),  # Qwen-Image's, which are read
    "parts": keyed("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", format="diffusers"),
    "diffusers alpha": keyed("transformer.transformer_blocks.0.attn.to_q.alpha", format="diffusers"),
    "vllm scale": read("rslora", use_rslora=True),
    "vllm experts": experts("gate_up_proj", "down_proj"),
    "tied": made("head"),
    "tied_embedding": made("embedding"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "rule"), RULES, ids=lambda value: value if isinstance(value, str) else value.id)
def test_a_rule_finds_what_breaks_it_and_nothing_else(name: str, rule: Rule) -> None:
    breaking = BREAKING.get(f"{name} {rule.id}", BREAKING.get(rule.id))
    assert breaking is not None, "a rule needs an adapter that breaks it"
    keeping = KEEPING.get(f"{name} {rule.id}", KEEPING.get(rule.id, made("plain")))
    found, others = (strikes(make(name), target_of(name)) for make in (breaking, keeping))
    assert rule.id in {one.rule.id for one in found}
    assert rule.id not in {one.rule.id for one in others}
