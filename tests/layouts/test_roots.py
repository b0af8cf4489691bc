"""What names begin with: the same model by its folder, in single files, flat and in an adapter; and what a side calls it."""

from __future__ import annotations

import pytest

from loratools.errors import AmbiguousError
from loratools.layouts.roots import ROOTS, Roots, by_root, joined, split_root, split_word

CLIP = {("text_encoder", "lora_te1"): "clip", ("text_encoder_2", "lora_te2"): "clip"}


@pytest.mark.parametrize("role", ROOTS)
def test_every_root_is_split_off(role: str) -> None:
    for root in ROOTS[role]:
        assert split_root(f"{root}.a.b.weight") == (role, root, "a.b.weight")
        assert joined(root, "a.b.weight") == f"{root}.a.b.weight"


def test_the_longest_root_and_none() -> None:
    assert split_root("text_encoder_2.x")[:2] == ("text_encoder_2", "text_encoder_2")
    assert split_root("model.diffusion_model.x")[:2] == ("denoiser", "model.diffusion_model")
    assert split_root("unet_x.y") == ("denoiser", "", "unet_x.y") and joined("", "x") == "x"


@pytest.mark.parametrize(("word", "expected"), [
    ("lora_unet_conv_in", ("denoiser", "lora_unet", "conv_in")), ("lora_te_x", ("text_encoder", "lora_te", "x")),
    ("lora_te1_x", ("text_encoder", "lora_te1", "x")), ("lora_te3_x", ("text_encoder_3", "lora_te3", "x")),
    ("lora_transformer_x", ("denoiser", "lora_transformer", "x")), ("loraunet_x", None),
])  # fmt: skip
def test_flat_names(word: str, expected: tuple[str, str, str] | None) -> None:
    assert split_word(word) == expected


def test_names_by_root() -> None:
    found = by_root(["unet.a", "text_encoder.b", "unet.c"])
    assert found == {("denoiser", "unet"): ["a", "c"], ("text_encoder", "text_encoder"): ["b"]}


@pytest.mark.parametrize(("networks", "side", "expected"), [
    ({("denoiser", "lora_unet"): "unet"}, "diffusers", ["unet"]),
    ({("denoiser", "diffusion_model"): "flux"}, "diffusers", ["transformer"]),
    ({("denoiser", "transformer"): "flux"}, "original", ["diffusion_model"]),
    ({("denoiser", "model.diffusion_model"): "unet"}, "original", ["model.diffusion_model"]),
    ({("denoiser", "unet"): "unet", ("text_encoder", "text_encoder"): "clip"}, "original",
     ["diffusion_model", "cond_stage_model.transformer"]),
    (CLIP, "original", ["text_encoders.clip_l.transformer", "text_encoders.clip_g.transformer"]),
    (CLIP, "diffusers", ["text_encoder", "text_encoder_2"]),
    # Flux: CLIP and T5, which kohya numbers as SD3's third
    ({("denoiser", "lora_unet"): "flux", ("text_encoder", "lora_te1"): "clip", ("text_encoder_3", "lora_te3"): "t5"}, "diffusers",
     ["transformer", "text_encoder", "text_encoder_2"]),
    ({("denoiser", "lora_unet"): "flux", ("text_encoder", "lora_te1"): "clip", ("text_encoder_3", "lora_te3"): "t5"}, "original",
     ["diffusion_model", "text_encoders.clip_l.transformer", "text_encoders.t5xxl.transformer"]),
    ({("denoiser", "lora_unet"): "sd3", ("text_encoder_3", "lora_te3"): "t5"}, "diffusers", ["transformer", "text_encoder_3"]),
    ({**CLIP, ("text_encoder_3", "lora_te3"): "t5"}, "diffusers", ["text_encoder", "text_encoder_2", "text_encoder_3"]),
    ({("text_encoder_2", "text_encoder_2"): "t5"}, "original", ["text_encoders.t5xxl.transformer"]),
])  # fmt: skip
def test_the_roots_of_a_side(networks: dict[tuple[str, str], str], side: str, expected: list[str]) -> None:
    roots = Roots(side, networks, alone=False)
    assert [roots.of(*key) for key in networks] == expected


def test_a_model_alone_has_none() -> None:
    assert Roots("diffusers", {("denoiser", ""): "flux"}, alone=True).of("denoiser", "") == ""


def test_a_t5_alone_is_of_two_pipelines() -> None:
    with pytest.raises(AmbiguousError, match="second text encoder of Flux, or the third of SD3; give the base"):
        Roots("diffusers", {("text_encoder_3", "lora_te3"): "t5"}, alone=False).of("text_encoder_3", "lora_te3")
