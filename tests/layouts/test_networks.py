"""The table of diffusion networks, held against diffusers' own conversions: every tensor once, the same rows, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from loratools.layouts.networks import Pair, networks, recognised
from tests.layouts._models import BEYOND, RESHAPED

diffusers = pytest.importorskip("diffusers")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=4, pooled_projection_dim=4,
        axes_dims_rope=(0, 2, 2), in_channels=4, guidance_embeds=True,
    )  # fmt: skip


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=4,
        caption_projection_dim=8, pooled_projection_dim=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def unet(layers: int = 2, first: bool = False) -> nn.Module:
    """As SD 1 is, whose outermost block has attentions and innermost none, or with the first without, as SDXL has it."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D") if first else ("CrossAttnDownBlock2D", "DownBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=layers, norm_num_groups=2, cross_attention_dim=4,
        attention_head_dim=2, down_block_types=kinds, up_block_types=tuple(kind.replace("Down", "Up") for kind in kinds[::-1]),
        **(added if first else {}),
    )  # fmt: skip


def originals(model: nn.Module) -> tuple[dict[str, Tensor], Mapping[str, Pair]]:
    """The authors' tensors by the table, with no values but their rows' numbers, and the pairs they came from."""
    own = model.state_dict()
    found = recognised(list(own))
    assert found is not None and found[1] == "diffusers"
    pairs = found[0].pairs(list(own), whole=True)
    if found[0].name == "krea2":
        own = {name: value for name, value in own.items() if not re.match(RESHAPED, name)}
    assert set(own) <= set(pairs.diffusers)
    used = {pair.original: pair for pair in (pairs.diffusers[name][0] for name in own)}
    made = {name: torch.cat([own[part] for part in pair.diffusers]) for name, pair in used.items()}
    again = recognised(list(made))
    assert again == (found[0], "original")
    assert set(made) <= set(again[0].pairs(list(made), whole=True).original)
    return made, used


@pytest.mark.parametrize("model", [unet(1), unet(2), unet(2, True), unet(3, True)], ids=["1", "2", "xl", "xl3"])
def test_unets(model: nn.Module) -> None:
    made, used = originals(model)
    whole = {f"model.diffusion_model.{name}": value for name, value in made.items()}
    converted = single_file.convert_ldm_unet_checkpoint(whole, model.config)
    assert set(converted) == set(model.state_dict())
    assert all(converted[pair.diffusers[0]] is made[name] for name, pair in used.items())


CONVERSIONS = {
    "flux": "flux_transformer_checkpoint_to_diffusers", "sd3": "sd3_transformer_checkpoint_to_diffusers",
    "hunyuan-video": "hunyuan_video_transformer_to_diffusers", "chroma": "chroma_transformer_checkpoint_to_diffusers",
    "flux2": "flux2_transformer_checkpoint_to_diffusers", "wan": "wan_transformer_to_diffusers",
    "z-image": "z_image_transformer_checkpoint_to_diffusers", "lumina2": "lumina2_to_diffusers",
    "krea2": "krea2_transformer_checkpoint_to_diffusers", "cosmos2": "cosmos_transformer_checkpoint_to_diffusers",
    "ltx": "ltx_transformer_checkpoint_to_diffusers", "auraflow": "auraflow_transformer_checkpoint_to_diffusers",
    "sana": "sana_transformer_to_diffusers",
}  # fmt: skip
MODELS = {"flux": flux, "sd3": sd3, **BEYOND}
# sizes that diffusers' conversions have in them, whatever the model's are
FIXED = {("flux", "linear1"): 21504, ("hunyuan-video", "linear1"): 21504, ("chroma", "linear1"): 21504, ("lumina2", "qkv"): 3840}
UNUSED = {"sana": ("pos_embed", "y_embedder.y_embedding")}  # what it takes out of a file


@pytest.mark.parametrize("name", CONVERSIONS)
def test_transformers(name: str) -> None:
    convert = getattr(single_file, f"convert_{CONVERSIONS[name]}")
    made, used = originals(MODELS[name]())
    assert recognised(list(made)) == (next(network for network in networks() if network.name == name), "original")
    # rows numbered throughout; one column, where diffusers cuts at sizes of its own
    sizes = {key: FIXED.get((name, key.split(".")[-2] if "." in key else key), value.shape[0]) for key, value in made.items()}
    offsets = {key: 100_000 * index for index, key in enumerate(made)}
    table = {key: torch.arange(sizes[key]) + offsets[key] for key in made}
    root = "net." if name == "cosmos2" else ""
    converted = convert({root + key: value for key, value in table.items()} | dict.fromkeys(UNUSED.get(name, ())))
    assert set(converted) == {theirs for pair in used.values() for theirs in pair.diffusers}
    for key, pair in used.items():
        starts = pair.starts(sizes[key])
        assert starts is not None
        parts = [table[key][starts[part] : starts[part + 1]] for part in range(len(pair.shares))]
        if pair.swapped(tuple(made[key.removesuffix("bias") + "weight"].shape) if key.endswith("bias") else tuple(made[key].shape)):
            parts = [torch.cat(parts[0].chunk(2)[::-1])]
        assert all(torch.equal(converted[theirs], part) for theirs, part in zip(pair.diffusers, parts, strict=True)), key


@pytest.mark.parametrize("name", ["qwen-image", "hidream"])
def test_networks_of_one_set_of_names(name: str) -> None:
    """Nothing converts them, and so does the table."""
    own = BEYOND[name]().state_dict()
    found = recognised(list(own))
    assert found is not None and (found[0].name, found[1]) == (name, "diffusers")
    pairs = found[0].pairs(list(own), whole=True)
    assert set(own) <= set(pairs.diffusers) and all(pairs.diffusers[key][0].original == key for key in own)


def test_what_the_last_context_block_of_sd3_swaps_is_told_by_its_shape() -> None:
    _, used = originals(sd3())
    pair = used["joint_blocks.2.context_block.adaLN_modulation.1.weight"]
    assert pair.swapped((16, 8)) and not pair.swapped((48, 8)) and not pair.swapped((16,))


def test_openclip() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=6,
        projection_dim=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config)
    made, used = originals(model)
    made["text_projection"] = made["text_projection"].T.contiguous()
    converted = single_file.convert_open_clip_checkpoint(model, {f"a.{name}": value for name, value in made.items()}, "a.")
    own = model.state_dict()
    assert set(converted) == set(own) == {name for pair in used.values() for name in pair.diffusers}
    assert all(torch.equal(converted[name], own[name]) for name in own)


def test_shares_that_do_not_divide_the_rows() -> None:
    assert Pair("a", ("b", "c"), (1, 4)).starts(10) == (0, 2, 10)
    assert Pair("a", ("b", "c"), (1, 4)).starts(11) is None


def test_no_network() -> None:
    assert recognised(["model.layers.0.mlp.up_proj.weight"]) is None
    assert [network.name for network in networks()] == ["flux", "sd3", *BEYOND, "unet", "clip", "t5"]


def test_a_networks_parts_that_it_shares_are_in_its_rows() -> None:
    assert not [row for network in networks() for row in network.rows if row[0] == "each"]
    forms = {network.name: network.forms for network in networks()}
    assert "double_blocks_#_img_attn_qkv.weight" in forms["flux"] & forms["chroma"] & forms["flux2"]
    assert "blocks_#_modulation.weight" in forms["wan"] and "blocks_#_modulation.bias" not in forms["wan"]
