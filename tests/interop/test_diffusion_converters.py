"""diffusers' own conversions of other programs' LoRA files, live: what convert writes has the same modules and the same ΔW."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import convert
from loratools.formats import load
from tests.layouts._adapters import dense
from tests.layouts._models import BEYOND
from tests.layouts.test_networks import FIXED, originals
from tests.strategies import randn

utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
# by network: its function there, and which modules that takes
DOTTED = {
    "hunyuan-video": ("hunyuan_video_lora", r"(double|single)_blocks\..*|img_in\.proj|final_layer\.linear|vector_in\..*"),
    "flux2": ("non_diffusers_flux2_lora", r"(?!final_layer\.adaLN).*"),  # whose halves it leaves as they were
    "qwen-image": ("non_diffusers_qwen_lora", r".*"),
    "wan": ("non_diffusers_wan_lora", r"blocks\.\d+\..*|time_projection\.1|head\.head|(text|time)_embedding\.[02]|img_emb\.proj\.[13]"),
    "z-image": ("non_diffusers_z_image_lora", r".*\.(attention\.to_.*|feed_forward\..*)"),
    "lumina2": ("non_diffusers_lumina2_lora", r".*(refiner|layers)\.\d+\..*"),
    "krea2": ("non_diffusers_krea2_lora", r".*"),
    "cosmos2": ("non_diffusers_anima_lora", r"(?!x_embedder).*"),
    "ltx": ("non_diffusers_ltxv_lora", r".*\.(attn[12]\.to_.*|ff\..*)"),
    "hidream": ("non_diffusers_hidream_lora", r".*"),
}  # fmt: skip
FLAT = {
    "wan": ("musubi_wan_lora", r"blocks\.\d+\..*"), "flux2": ("kohya_flux2_lora", r"(double|single)_blocks\..*|img_in|txt_in"),
    "qwen-image": ("non_diffusers_qwen_lora", r"transformer_blocks\..*|img_in|txt_in|proj_out"),
    "z-image": ("non_diffusers_z_image_lora", r"layers\.\d+\.(attention\.to_[qkv]|feed_forward\.w\d)"),
}  # fmt: skip


def modules(name: str, pattern: str) -> dict[str, tuple[int, int]]:
    """Linear layers by the authors' names; of those that have diffusers' in these files, by diffusers'."""
    model = BEYOND[name]()
    tensors = model.state_dict() if name in ("qwen-image", "hidream") or "to_" in pattern else originals(model)[0]
    found = {key.removesuffix(".weight"): value.shape for key, value in tensors.items() if key.endswith(".weight") and value.ndim == 2}
    found = {key: shape for key, shape in found.items() if re.fullmatch(pattern, key)}
    return {key: (FIXED.get((name, key.rpartition(".")[2]), rows), width) for key, (rows, width) in found.items()}


def lora(
    shapes: Mapping[str, tuple[int, int]], words: Mapping[str, str], suffixes: tuple[str, str], alpha: float | None
) -> dict[str, Tensor]:
    found = {}
    for seed, (key, (rows, width)) in enumerate(shapes.items()):
        found[f"{words[key]}.{suffixes[0]}.weight"] = randn(2, width, seed=2 * seed)
        found[f"{words[key]}.{suffixes[1]}.weight"] = randn(rows, 2, seed=2 * seed + 1)
        if alpha is not None:
            found[f"{words[key]}.alpha"] = torch.tensor(alpha)
    assert len(found) > 12
    return found


def same_as_theirs(folder: Path, tensors: dict[str, Tensor], function: str, **words: str) -> None:
    save_file(tensors, folder / "a.safetensors")
    convert(folder / "a.safetensors", folder / "b.safetensors", format="diffusers", **words)  # type: ignore[arg-type]
    theirs = getattr(utils, f"_convert_{function}_to_diffusers")({key: value.clone() for key, value in tensors.items()})
    found = {name.removesuffix(".weight"): dense(delta) for name, delta in load(folder / "b.safetensors").items()}
    assert set(found) == {key.partition(".lora_")[0] for key in theirs}
    for module, change in found.items():
        A, B = (theirs[f"{module}.lora_{side}.weight"].double() for side in "AB")
        torch.testing.assert_close(change, B @ A, rtol=1e-6, atol=1e-6)  # which has the scale in float32 factors


@pytest.mark.parametrize("name", DOTTED)
def test_dotted(tmp_path: Path, name: str) -> None:
    function, pattern = DOTTED[name]
    shapes = modules(name, pattern)
    tensors = lora(shapes, {key: f"diffusion_model.{key}" for key in shapes}, ("lora_A", "lora_B"), None)
    same_as_theirs(tmp_path, tensors, function)


@pytest.mark.parametrize("name", FLAT)
def test_flat(tmp_path: Path, name: str) -> None:
    """The same under kohya's names, alphas beside each."""
    function, pattern = FLAT[name]
    shapes = {key: shape for key, shape in modules(name, pattern).items() if "_img" not in key.rpartition(".")[2] or name != "wan"}
    tensors = lora(shapes, {key: f"lora_unet_{key.replace('.', '_')}" for key in shapes}, ("lora_down", "lora_up"), 1.0)
    same_as_theirs(tmp_path, tensors, function)
