"""ComfyUI's and BFL's files: dotted names under their roots, all suffixes, whole differences and replacements."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import convert, merge
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError
from loratools.formats import load
from loratools.formats.comfyui import decode
from tests.files import read_checkpoint, write_checkpoint
from tests.formats.keytables import container
from tests.strategies import randn

UP, DOWN, W = randn(4, 2, seed=0), randn(2, 6, seed=1), randn(4, 6, seed=2)
ROOT = "diffusion_model.double_blocks.0.img_attn"


def merged(folder: Path, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    names = {"double_blocks.0.img_attn.qkv.weight": W.double(), "double_blocks.0.img_attn.qkv.bias": torch.ones(4).double()}
    base = write_checkpoint(folder / "base", {prefix + name: tensor for name, tensor in names.items()})
    save_file({f"{ROOT}.qkv.{slot}": tensor for slot, tensor in tensors.items()}, folder / "a.safetensors")
    merge(base, folder / "a.safetensors", folder / "out")
    return {name.removeprefix(prefix): tensor for name, tensor in read_checkpoint(folder / "out").items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("spelling", [("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")])
def test_any_spelling_on_any_prefix(tmp_path: Path, spelling: tuple[str, str], prefix: str) -> None:
    found = merged(tmp_path, dict(zip(spelling, (UP, DOWN), strict=True)), prefix)["double_blocks.0.img_attn.qkv.weight"]
    assert torch.allclose(found, W.double() + UP.double() @ DOWN.double(), rtol=1e-12, atol=1e-12)


def test_whole_differences_and_replacements(tmp_path: Path) -> None:
    found = merged(tmp_path / "diff", {"diff": torch.ones(4, 6), "diff_b": torch.ones(4)})
    assert torch.equal(found["double_blocks.0.img_attn.qkv.weight"], W.double() + 1)
    assert torch.equal(found["double_blocks.0.img_attn.qkv.bias"], torch.full((4,), 2.0).double())
    found = merged(tmp_path / "set", {"set_weight": torch.ones(4, 6).double()})
    assert torch.equal(found["double_blocks.0.img_attn.qkv.weight"], torch.ones(4, 6).double())


def test_a_published_file() -> None:
    adapter = decode(container("flux_lora_aitoolkit_format"))
    assert len(adapter) == 228 and all(isinstance(delta, LowRank) and delta.scaling == 1 for delta in adapter.values())


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({f"{ROOT}.qkv.lora_down.weight": DOWN}, "has no lora_up.weight beside it"),
        ({f"{ROOT}.qkv.diff": W, f"{ROOT}.mystery": W.clone()}, "mystery: no tensor of this family"),
        ({f"{ROOT}.qkv.diff": W, "elsewhere.x.diff": W.clone()}, "elsewhere.x: lies under none of the roots"),
    ],
)
def test_faults(tmp_path: Path, tensors: dict[str, Tensor], text: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises((FormatError, LoratoolsError)) as caught:
        load(tmp_path / "a.safetensors")
    assert text in str(caught.value)


SCALE = "double_blocks.0.img_attn.norm.query_norm.scale"


@pytest.mark.parametrize("suffix", ["diff", "set_weight"])
@pytest.mark.parametrize("root", ["", "model.diffusion_model."])
def test_a_bare_parameter(tmp_path: Path, root: str, suffix: str) -> None:
    """A Flux control LoRA's norms, which are no module's weight: merged, and written again under the same key."""
    value = randn(4, seed=1)
    save_file({f"diffusion_model.{SCALE}.{suffix}": value}, tmp_path / "a.safetensors")
    before = {f"{root}{SCALE}": torch.ones(4), f"{root}img_in.weight": randn(4, 4, seed=2)}
    save_file(before, tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    after = load_file(tmp_path / "out.safetensors")
    assert torch.equal(after[f"{root}{SCALE}"], value if suffix == "set_weight" else (1 + value.double()).float())
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="comfyui", base=tmp_path / "base.safetensors")
    written = "w_norm" if suffix == "diff" else suffix  # one word of ComfyUI's for another
    assert set(load_file(tmp_path / "b.safetensors")) == {f"diffusion_model.{SCALE}.{written}"}


def test_a_control_lora_of_bfl(tmp_path: Path) -> None:
    """No root, biases as LoRA's, whole scales of norms, and an input that grows: as ComfyUI's `convert_lora_bfl_control` has it."""
    attention = "double_blocks.0.img_attn"
    A, B, wide = randn(2, 4, seed=1), randn(12, 2, seed=2), randn(2, 6, seed=3)
    tensors = {
        f"{attention}.qkv.lora_A.weight": A, f"{attention}.qkv.lora_B.weight": B, f"{attention}.qkv.lora_B.bias": randn(12, seed=4),
        f"{attention}.norm.query_norm.scale": randn(4, seed=5), "img_in.lora_A.weight": wide, "img_in.lora_B.weight": randn(4, 2, seed=6),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    before = {
        f"{attention}.qkv.weight": randn(12, 4, seed=7), f"{attention}.qkv.bias": randn(12, seed=8), "img_in.weight": randn(4, 3, seed=9),
        f"{attention}.norm.query_norm.scale": torch.ones(4),
    }  # fmt: skip
    save_file(before, tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    after = {name: value.double() for name, value in load_file(tmp_path / "out.safetensors").items()}
    grown = torch.cat([before["img_in.weight"], torch.zeros(4, 3)], 1).double()
    expected = {
        f"{attention}.qkv.weight": before[f"{attention}.qkv.weight"].double() + B.double() @ A.double(),
        f"{attention}.qkv.bias": before[f"{attention}.qkv.bias"].double() + tensors[f"{attention}.qkv.lora_B.bias"].double(),
        "img_in.weight": grown + tensors["img_in.lora_B.weight"].double() @ wide.double(),
        f"{attention}.norm.query_norm.scale": tensors[f"{attention}.norm.query_norm.scale"].double(),
    }  # fmt: skip
    assert set(after) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(after[name], value, rtol=1e-6, atol=1e-6)  # rounded to float32
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="comfyui", base=tmp_path / "base.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "b.safetensors", tmp_path / "again.safetensors")
    assert all(torch.equal(value, after[name].float()) for name, value in load_file(tmp_path / "again.safetensors").items())
    save_file(tensors | {f"{attention}.x": A.clone()}, tmp_path / "c.safetensors")
    with pytest.raises(FormatError, match=rf"{attention}\.x: no tensor of this family"):
        load(tmp_path / "c.safetensors")
