"""diffusers, live: files with kohya's, LDM's and BFL's names, loaded by its own loaders and merged by us, give the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loratools import convert, merge
from loratools.errors import LoratoolsError
from loratools.layouts.networks import recognised
from tests.files import write_pipeline
from tests.strategies import randn

diffusers = pytest.importorskip("diffusers")
loaders = pytest.importorskip("diffusers.loaders")
# float32 through some twenty layers, of which each sums in an order of its own: relative to the largest output
LIMIT = 1e-5


def flux() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8), in_channels=4,
    ).eval()  # fmt: skip


def sd3() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def outputs(model: nn.Module) -> Tensor:
    kind = type(model).__name__
    with torch.no_grad():
        if kind.startswith("UNet"):
            return model(randn(2, 4, 8, 8, seed=1), 7, encoder_hidden_states=randn(2, 3, 8, seed=2)).sample
        if kind.startswith("SD3"):
            words, pooled = randn(1, 3, 8, seed=2), randn(1, 8, seed=3)
            return model(randn(1, 4, 8, 8, seed=1), words, pooled, torch.tensor([7.0])).sample
        return model(
            randn(1, 6, 4, seed=1), encoder_hidden_states=randn(1, 3, 8, seed=2), pooled_projections=randn(1, 8, seed=3),
            timestep=torch.tensor([0.7]), img_ids=randn(6, 3, seed=4), txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip


def originals(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as its authors' file has them."""
    found = recognised(list(own))
    assert found is not None
    pairs = found[0].pairs(list(own), whole=True)
    made = {}
    for pair in {pairs.diffusers[name][0].original: pairs.diffusers[name][0] for name in own}.values():
        value = torch.cat([own[name] for name in pair.diffusers])
        weight = own[pair.diffusers[0].removesuffix("bias") + "weight"] if pair.diffusers[0].endswith("bias") else value
        made[pair.original] = torch.cat(value.chunk(2)[::-1]) if pair.swapped(tuple(weight.shape)) else value
    return made


def lora(weights: dict[str, Tensor], prefix: str, flat: bool = True) -> dict[str, Tensor]:
    """A kohya LoRA of every matrix and convolution, alpha half the rank."""
    tensors = {}
    for seed, (name, weight) in enumerate(weights.items()):
        if weight.ndim not in (2, 4) or not name.endswith(".weight"):
            continue
        out, width, *kernel = weight.shape
        module = name.removesuffix(".weight")
        word = prefix + (module.replace(".", "_") if flat else module)
        tensors[f"{word}.lora_down.weight"] = 0.2 * randn(2, width, *kernel, seed=seed)
        tensors[f"{word}.lora_up.weight"] = 0.2 * randn(out, 2, *(1 for _ in kernel), seed=seed + 500)
        tensors[f"{word}.alpha"] = torch.tensor(1.0)
    assert len(tensors) > 12
    return tensors


def close(one: Tensor, other: Tensor, plain: Tensor) -> None:
    assert float((one - other).abs().max() / other.abs().max()) <= LIMIT
    assert float((other - plain).abs().max() / plain.abs().max()) > 0.01


def pipeline(folder: Path, model: nn.Module) -> tuple[Path, str]:
    part = "unet" if type(model).__name__.startswith("UNet") else "transformer"
    return write_pipeline(folder, {part: (model.state_dict(), {"_class_name": type(model).__name__})}), part


def merged(model: nn.Module, folder: Path) -> nn.Module:
    model.load_state_dict(load_file(next(folder.glob("*.safetensors"))))
    return model


def test_a_unet_under_ldm_names(tmp_path: Path) -> None:
    base, part = pipeline(tmp_path / "base", unet())
    tensors = lora({k: v for k, v in originals(unet().state_dict()).items() if not k.startswith(("time_embed", "out."))}, "lora_unet_")
    save_file(tensors, tmp_path / "a.safetensors")
    mixin, theirs = loaders.StableDiffusionXLLoraLoaderMixin, unet()
    state, alphas = mixin.lora_state_dict(dict(tensors), unet_config=theirs.config)[:2]
    mixin.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    receipt = merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"] == len(tensors) // 3
    assert any("are others in the base (unet, diffusers names" in note for note in receipt["notes"])
    close(outputs(merged(unet(), tmp_path / "out" / part)), outputs(theirs), outputs(unet()))


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_flux_under_bfl_names(tmp_path: Path, prefix: str) -> None:
    base, part = pipeline(tmp_path / "base", flux())
    # diffusers cuts linear1 at 3072 rows each whatever the model's size, so of tiny ones it reads the double blocks alone
    tensors = lora({k: v for k, v in originals(flux().state_dict()).items() if "double" in k}, prefix, prefix.endswith("_"))
    save_file(tensors, tmp_path / "a.safetensors")
    theirs = flux()
    theirs.load_lora_adapter(loaders.FluxLoraLoaderMixin.lora_state_dict(dict(tensors)), prefix="transformer")
    receipt = merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    assert receipt["applied"] == receipt["expected"]
    close(outputs(merged(flux(), tmp_path / "out" / part)), outputs(theirs), outputs(flux()))


LOADERS = {
    "flux": ("FluxLoraLoaderMixin", "transformer"), "sd3": ("SD3LoraLoaderMixin", "transformer"),
    "unet": ("StableDiffusionLoraLoaderMixin", "unet"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "prefix"), [(flux, "lora_unet_"), (flux, "diffusion_model."), (sd3, "lora_unet_"), (unet, "lora_unet_")])
def test_diffusers_loads_what_was_written_without_a_base(tmp_path: Path, make: type, prefix: str) -> None:
    """Every matrix and convolution of the network, from its authors' names; merged is the file as it was."""
    base, part = pipeline(tmp_path / "base", make())
    tensors = lora(originals(make().state_dict()), prefix, prefix.endswith("_"))
    save_file(tensors, tmp_path / "a.safetensors")
    receipt = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="diffusers")
    assert receipt["notes"] and all(note.startswith("layout diffusers: ") for note in receipt["notes"])
    name, kind = LOADERS[make.__name__]
    mixin, theirs = getattr(loaders, name), make()
    found = mixin.lora_state_dict(tmp_path, weight_name="b.safetensors", return_lora_metadata=True, local_files_only=True)
    if kind == "unet":
        mixin.load_lora_into_unet(found[0], network_alphas=found[1], unet=theirs, metadata=found[2])
    else:
        more = {"network_alphas": None} if make is flux else {}  # the file has none: its metadata tells the scales
        mixin.load_lora_into_transformer(found[0], transformer=theirs, metadata=found[-1], **more)
    merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    close(outputs(merged(make(), tmp_path / "out" / part)), outputs(theirs), outputs(make()))


@pytest.mark.parametrize("make", [flux, sd3, unet])
@pytest.mark.parametrize("names", ["original", "diffusers"])
def test_either_names_on_either_base_give_the_same_bits(tmp_path: Path, make: type, names: str) -> None:
    own = make().state_dict()
    single = originals(own)
    base, part = pipeline(tmp_path / "base", make())
    save_file({f"model.diffusion_model.{k}": v.contiguous() for k, v in single.items()}, tmp_path / "single.safetensors")
    tensors = lora(single if names == "original" else own, "lora_unet_")
    save_file(tensors, tmp_path / "a.safetensors")
    merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    merge(tmp_path / "single.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    one = originals(load_file(next((tmp_path / "out" / part).glob("*.safetensors"))))
    other = load_file(tmp_path / "out.safetensors")
    assert set(other) == {f"model.diffusion_model.{name}" for name in one}
    assert all(torch.equal(other[f"model.diffusion_model.{name}"], one[name]) for name in one)
    kept = {name for name, value in single.items() if value.ndim not in (2, 4) or not name.endswith(".weight")}
    assert kept == {name for name in one if torch.equal(one[name], single[name])}


@pytest.mark.parametrize("make", [flux, sd3])
def test_diffusers_names_on_the_authors_base(tmp_path: Path, make: type) -> None:
    own = make().state_dict()
    save_file({k: v.contiguous() for k, v in originals(own).items()}, tmp_path / "single.safetensors")
    tensors = lora(own, "transformer.", flat=False)
    peft = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in tensors.items() if "alpha" not in k}
    save_file(peft, tmp_path / "a.safetensors")
    theirs = make()
    theirs.load_lora_adapter(peft, prefix="transformer")
    merge(tmp_path / "single.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    done, converted = load_file(tmp_path / "out.safetensors"), make().state_dict()
    model = make()
    model.load_state_dict(back(done, converted))
    close(outputs(model), outputs(theirs), outputs(make()))


def back(done: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    found = recognised(list(own))
    assert found is not None
    made = {}
    for name, (pair, part) in found[0].pairs(list(own), whole=True).diffusers.items():
        if name not in own:
            continue
        value = done[pair.original]
        starts = pair.starts(len(value))
        assert starts is not None
        weight = done[pair.original.removesuffix("bias") + "weight"] if pair.original.endswith("bias") else value
        value = torch.cat(value.chunk(2)[::-1]) if pair.swapped(tuple(weight.shape)) else value
        made[name] = value[starts[part] : starts[part + 1]]
    return made


def test_magnitudes_of_inputs_cannot_be_cut(tmp_path: Path) -> None:
    base, _ = pipeline(tmp_path / "base", flux())
    word = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{word}.lora_down.weight": randn(2, 32, seed=1), f"{word}.lora_up.weight": randn(96, 2, seed=2)}
    save_file(tensors | {f"{word}.dora_scale": torch.ones(96, 1)}, tmp_path / "rows.safetensors")
    save_file(tensors | {f"{word}.dora_scale": torch.ones(1, 32)}, tmp_path / "columns.safetensors")
    assert merge(base, tmp_path / "rows.safetensors", tmp_path / "out")["applied"] == 3
    with pytest.raises(LoratoolsError, match="along the inputs is one of all rows of its weight"):
        merge(base, tmp_path / "columns.safetensors", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize("root", ["conditioner.embedders.1.model", "conditioner.embedders.0.model", "cond_stage_model.model"])
def test_text_encoders_of_single_files(tmp_path: Path, root: str) -> None:
    """OpenCLIP's names, q, k and v in one, under transformers' names, which kohya's files have."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=6,
        projection_dim=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    own = transformers.CLIPTextModelWithProjection(config).state_dict()
    part = "text_encoder_2" if "conditioner" in root else "text_encoder"
    base = write_pipeline(tmp_path / "base", {part: (own, {"model_type": "clip_text_model"})})
    single = originals(own)
    single["text_projection"] = single["text_projection"].T
    save_file({f"{root}.{name}": value.contiguous() for name, value in single.items()}, tmp_path / "single.safetensors")
    modules = {name: value for name, value in own.items() if "embedding" not in name}
    save_file(lora(modules, "lora_te2_" if "conditioner" in root else "lora_te_"), tmp_path / "a.safetensors")
    merge(base, tmp_path / "a.safetensors", tmp_path / "out")
    merge(tmp_path / "single.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    one = originals(load_file(next((tmp_path / "out" / part).glob("*.safetensors"))))
    one["text_projection"] = one["text_projection"].T
    other = load_file(tmp_path / "out.safetensors")
    assert set(other) == {f"{root}.{name}" for name in one}
    assert all(torch.equal(other[f"{root}.{name}"], one[name]) for name in one)
    assert not torch.equal(one["text_projection"], single["text_projection"])
