"""Which network names are of: all of them, on either side, flat or dotted; a text encoder's; what two would call differently."""

from __future__ import annotations

import pytest

from loratools.errors import AmbiguousError, MatchError
from loratools.flatnames import flatten
from loratools.layouts.naming import Named, naming_of
from loratools.layouts.networks import networks

QKV = "double_blocks.0.img_attn.qkv.weight"
LAYER = "text_model.encoder.layers.3.self_attn.q_proj.weight"


def test_a_name_of_this_side_stays_and_another_has_a_pair() -> None:
    stays = naming_of([QKV], "denoiser", "original", flat=False)
    assert stays.network.name == "flux" and stays.named == {QKV: Named(QKV)}
    named = naming_of([QKV], "denoiser", "diffusers", flat=False).named[QKV]
    assert named.name == QKV and named.pair is not None and named.pair.diffusers[1] == "transformer_blocks.0.attn.to_k.weight"
    names = [named.pair.diffusers[1], "context_embedder.weight", "single_transformer_blocks.0.proj_mlp.weight"]
    part = naming_of(names, "denoiser", "original", flat=False)
    assert part.named[named.pair.diffusers[1]] == Named(named.pair.diffusers[1], named.pair, 1)


@pytest.mark.parametrize("side", ["original", "diffusers"])
def test_text_encoders_have_transformers_names_on_both_sides(side: str) -> None:
    assert naming_of([LAYER], "text_encoder", side, flat=False).named == {LAYER: Named(LAYER)}
    t5 = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert naming_of([t5], "text_encoder_2", side, flat=False).network.name == "t5"
    own = "transformer.resblocks.3.attn.out_proj.weight"
    assert (naming_of([own], "text_encoder_2", side, flat=False).named[own].pair is None) == (side == "original")


def test_a_denoiser_is_no_text_encoder() -> None:
    with pytest.raises(MatchError, match="names of no network"):
        naming_of([LAYER], "denoiser", "diffusers", flat=False)
    assert naming_of([LAYER], "any", "diffusers", flat=False).network.name == "clip"


@pytest.mark.parametrize("network", [network for network in networks() if network.name != "unet"], ids=lambda network: network.name)
@pytest.mark.parametrize("side", ["original", "diffusers"])
def test_no_two_names_of_a_network_are_spelt_alike(network: object, side: str) -> None:
    pairs = network.pairs(["a.2.b"], whole=False)  # type: ignore[attr-defined]
    names = {*pairs.original, *pairs.diffusers}
    assert len({flatten(name) for name in names}) == len(names)


def test_no_two_names_of_a_unet_are_spelt_alike() -> None:
    (unet,) = (network for network in networks() if network.name == "unet")
    pairs = unet.pairs(["down_blocks.3.attentions.1.transformer_blocks.2.x", "up_blocks.1.attentions.0.x"], whole=False)
    names = {*pairs.original, *pairs.diffusers}
    assert "down_blocks.3.attentions.1.transformer_blocks.2.norm1.weight" in names
    assert len({flatten(name) for name in names}) == len(names)


def test_flat_names_get_their_dots() -> None:
    word = "double_blocks_0_img_mlp_0.weight"
    assert naming_of([word], "denoiser", "original", flat=True).named[word].name == "double_blocks.0.img_mlp.0.weight"


def test_a_bare_parameter_that_is_replaced_as_a_module_of_its_own() -> None:
    name = "single_blocks.0.norm.query_norm.scale.weight"  # ComfyUI's `….scale.set_weight`
    pair = naming_of([name], "denoiser", "diffusers", flat=False).named[name].pair
    assert pair is not None and pair.diffusers == ("single_transformer_blocks.0.attn.norm_q.weight",)


def test_layers_are_tried_until_they_fit() -> None:
    three = ["down_blocks.0.resnets.2.conv1.weight", "down_blocks.1.resnets.2.conv1.weight"]
    pair = naming_of(three, "denoiser", "original", flat=False, base=[*three, "conv_in.weight", *_rest(2)]).named[three[1]].pair
    assert pair is not None and pair.original == "input_blocks.7.0.in_layers.2.weight"
    with pytest.raises(AmbiguousError, match="a UNet of 3 layers per block or a UNet of 4"):
        naming_of(three, "denoiser", "original", flat=False)


def _rest(blocks: int) -> list[str]:
    tail = ["time_embedding.linear_1.weight", "up_blocks.0.resnets.0.norm1.weight"]
    return [f"down_blocks.{block}.resnets.0.norm1.weight" for block in range(blocks)] + tail
