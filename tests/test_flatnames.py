"""Flat names meet a base's by flattening those: parts of pipelines, models alone, single-file checkpoints, and two spelt alike."""

from __future__ import annotations

import pytest

from loratools.errors import AmbiguousError
from loratools.flatnames import flatten, meet, spelt, split_prefix

UNET = ["down_blocks.0.attentions.0.to_out.0.weight", "down_blocks.0.proj_in.weight", "down_blocks.0.proj_in.bias"]


def test_a_pipelines_parts_have_prefixes_of_their_own() -> None:
    base = [f"unet.{name}" for name in UNET] + ["text_encoder.layers.0.fc1.weight", "text_encoder_2.layers.0.fc1.weight"]
    words = {
        "lora_unet_down_blocks_0_attentions_0_to_out_0.weight": "unet.down_blocks.0.attentions.0.to_out.0.weight",
        "lora_unet_down_blocks_0_proj_in.bias": "unet.down_blocks.0.proj_in.bias",
        "lora_te1_layers_0_fc1.weight": "text_encoder.layers.0.fc1.weight",
        "lora_te2_layers_0_fc1.weight": "text_encoder_2.layers.0.fc1.weight",
    }
    assert meet(words, base) == words
    doubled = "lora_unet_unet_down_blocks_0_proj_in.weight"  # a converter's, of a file that is about
    assert meet([doubled], base) == {doubled: "unet.down_blocks.0.proj_in.weight"}
    assert meet(["lora_te_layers_0_fc1.weight"], base) == {"lora_te_layers_0_fc1.weight": "text_encoder.layers.0.fc1.weight"}
    assert meet(["lora_unet_layers_0_fc1.weight", "lora_te3_layers_0_fc1.weight"], base) == {}


@pytest.mark.parametrize("prefix", ["lora_unet", "lora_te", "lora_transformer", "lycoris", "lora_unet_", "lora_unet_unet"])
def test_a_model_alone_takes_any_prefix(prefix: str) -> None:
    word = f"{prefix}_down_blocks_0_proj_in.weight"
    assert meet([word], UNET) == {word: "down_blocks.0.proj_in.weight"}


def test_single_file_checkpoints() -> None:
    base = ["model.diffusion_model.input_blocks.1.1.proj_in.weight", "conditioner.embedders.0.transformer.text_model.fc1.weight"]
    words = {"lora_unet_input_blocks_1_1_proj_in.weight": base[0], "lora_te1_text_model_fc1.weight": base[1]}
    assert meet(words, base) == words


def test_two_tensors_spelt_alike_are_ambiguous() -> None:
    with pytest.raises(AmbiguousError, match=r"a\.b_c\.weight and a_b\.c\.weight"):
        meet(["lora_unet_a_b_c.weight"], ["a.b_c.weight", "a_b.c.weight"])


def test_the_words_themselves() -> None:
    assert flatten("a.b_c.0") == "a_b_c_0"
    assert split_prefix("model.layers") is None and split_prefix("lora_prior_unet_x") == ("lora_prior_unet", "x")
    assert spelt("transformer.x.y", ["transformer"]) == "lora_unet_x_y" and spelt("vae.x", ["vae"]) is None


def test_the_t5_of_flux_is_the_second_to_diffusers_and_the_third_to_kohya() -> None:
    name = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
    word = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert meet([f"{word}.weight"], [f"{name}.weight"]) == {f"{word}.weight": f"{name}.weight"}
    assert spelt(name, ["transformer", "text_encoder", "text_encoder_2"]) == word
