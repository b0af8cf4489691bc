"""Digests in the metadata against those of a file that the safetensors library makes, as sd-scripts takes them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from loratools import convert
from tests.strategies import randn


def sd_scripts(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """`addnet_hash_safetensors` and `addnet_hash_legacy` of `library/train_util.py`, over the whole file in memory."""
    file = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(file[:8], "little")
    return hashlib.sha256(file[start:]).hexdigest(), hashlib.sha256(file[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]


@pytest.mark.parametrize("width", [4, 2**18 + 1, 2**18 + 2**14 + 3], ids=["short", "through the start", "through the whole"])
def test_as_sd_scripts_takes_them(tmp_path: Path, width: int) -> None:
    tensors = {"lora_unet_x.lora_up.weight": randn(6, 1, seed=0), "lora_unet_x.lora_down.weight": randn(1, width, seed=1)}
    tensors |= {"lora_unet_ü.lora_up.weight": randn(6, 2, seed=0).half(), "lora_unet_ü.lora_down.weight": randn(2, 3, seed=1).bfloat16()}
    said = {"ss_tag": 'é"\n', "modelspec.title": "x", "modelspec.hash_sha256": "0xold", "sshs_legacy_hash": "old"}
    save_file(tensors, tmp_path / "a.safetensors", metadata=said)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="kohya")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        metadata, written = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model, legacy = sd_scripts(written, metadata)
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == (model, legacy)
    assert metadata["modelspec.hash_sha256"] == f"0x{model}" and metadata["modelspec.title"] == "x" and metadata["ss_tag"] == 'é"\n'


def test_comfyuis_have_those_they_had(tmp_path: Path) -> None:
    root = "diffusion_model.x"
    tensors = {f"{root}.lora_up.weight": randn(6, 1, seed=0), f"{root}.lora_down.weight": randn(1, 4, seed=1)}
    for said, kept in (({}, set()), ({"sshs_model_hash": "old", "a": "b"}, {"sshs_model_hash", "a"})):
        save_file(tensors, tmp_path / "a.safetensors", metadata=said)
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", format="comfyui", overwrite=True)
        with safe_open(tmp_path / "b.safetensors", "pt") as file:
            metadata = file.metadata() or {}
            written = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert set(metadata) == kept
        assert metadata.get("sshs_model_hash") in (None, sd_scripts(written, {})[0])
