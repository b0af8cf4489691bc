"""A small adapter in each format beside a base it merges onto, whose files tests spoil."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.formats.native import encode
from loratools.tensors import to_ref
from tests.files import peft_config, write_checkpoint
from tests.strategies import randn

MODULES = ("down_blocks.0.fc", "down_blocks.1.fc")
OUT, IN, RANK = 4, 6, 2


@dataclass
class Small:
    """An adapter's tensors, config and metadata, the base's tensors, the words it is read by; `a` and `b` are a pair of its keys."""

    a: str
    b: str
    tensors: dict[str, Tensor]
    base: dict[str, Tensor] = field(default_factory=lambda: {f"{module}.weight": randn(OUT, IN, seed=9) for module in MODULES})
    config: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    words: dict[str, Any] = field(default_factory=dict)
    file: str = "adapter_model.safetensors"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """(the base, the adapter's folder) on disk."""
        import json

        write_checkpoint(folder / "base", self.base)
        (folder / "adapter").mkdir()
        save_file({key: tensor.contiguous().clone() for key, tensor in self.tensors.items()}, folder / "adapter" / self.file, self.metadata)
        if self.config is not None:
            (folder / "adapter" / "adapter_config.json").write_text(json.dumps(self.config))
        return folder / "base", folder / "adapter"


def _pairs(named: Callable[[str], tuple[str, str]], *, turned: bool = False) -> dict[str, Tensor]:
    tensors = {}
    for seed, module in enumerate(MODULES):
        a, b = named(module)
        A, B = randn(RANK, IN, seed=seed), randn(OUT, RANK, seed=seed + 5)
        tensors |= {a: A.T if turned else A, b: B.T if turned else B}
    return tensors


def _small(named: Callable[[str], tuple[str, str]], *, turned: bool = False, **more: Any) -> Small:
    return Small(*named(MODULES[0]), _pairs(named, turned=turned), **more)


def _flat(module: str) -> tuple[str, str]:
    word = f"lora_unet_{module.replace('.', '_')}"
    return f"{word}.lora_down.weight", f"{word}.lora_up.weight"


def peft() -> Small:
    config = peft_config(target_modules=["fc"], r=RANK)
    return _small(lambda module: (f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"), config=config)


def kohya() -> Small:
    small = _small(_flat)
    small.tensors |= {f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(2.0) for module in MODULES}
    return small


def diffusers() -> Small:
    return _small(lambda module: (f"{module}.lora.down.weight", f"{module}.lora.up.weight"))


def comfyui() -> Small:
    return _small(lambda module: (f"diffusion_model.{module}.lora_A.weight", f"diffusion_model.{module}.lora_B.weight"))


def mlx() -> Small:
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0}}
    return _small(lambda module: (f"{module}.lora_a", f"{module}.lora_b"), turned=True, config=config, file="adapters.safetensors")


def loralib() -> Small:
    return _small(lambda module: (f"{module}.lora_A", f"{module}.lora_B"), words={"alpha_in": 2.0})


def scratch() -> Small:
    return _small(lambda module: (f"{module}.lora.A", f"{module}.lora.B"), turned=True, words={"alpha_in": 2.0})


def native() -> Small:
    named = _pairs(lambda module: (f"{module}.weight/A", f"{module}.weight/B"))
    lows = {
        f"{module}.weight": LowRank(A=to_ref(named[f"{module}.weight/A"]), B=to_ref(named[f"{module}.weight/B"]), alpha=2.0, layer="linear")
        for module in MODULES
    }
    return Small(f"{MODULES[0]}.weight/A", f"{MODULES[0]}.weight/B", named, metadata=dict(encode(Adapter(lows)).metadata))


def cloneofsimo() -> Small:
    root = "mid_block.attentions.0.transformer_blocks.0.attn1"
    base = {f"{root}.{name}.weight": randn(IN, IN, seed=3) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    tensors = {}
    for index in range(4):
        tensors |= {f"unet:{index}:down": randn(RANK, IN, seed=index), f"unet:{index}:up": randn(IN, RANK, seed=index + 9)}
    return Small("unet:0:down", "unet:0:up", tensors, base, metadata={"unet": '["CrossAttention"]'})


def samlora() -> Small:
    base = {f"image_encoder.blocks.{block}.attn.qkv.weight": randn(3 * IN, IN, seed=block) for block in range(2)}
    tensors = {}
    for index in range(4):
        tensors |= {f"w_a_{index:03}": randn(RANK, IN, seed=index), f"w_b_{index:03}": randn(IN, RANK, seed=index + 9)}
    return Small("w_a_000", "w_b_000", tensors, base)


def xlabs() -> Small:
    base = {f"double_blocks.{block}.img_attn.proj.weight": randn(OUT, IN, seed=block) for block in range(2)}
    tensors = {}
    for block in range(2):
        path = f"double_blocks.{block}.processor.proj_lora1"
        tensors |= {f"{path}.down.weight": randn(RANK, IN, seed=block), f"{path}.up.weight": randn(OUT, RANK, seed=block + 9)}
    return Small("double_blocks.0.processor.proj_lora1.down.weight", "double_blocks.0.processor.proj_lora1.up.weight", tensors, base)


SMALL: Mapping[str, Callable[[], Small]] = {
    "peft": peft, "kohya": kohya, "diffusers": diffusers, "comfyui": comfyui, "mlx": mlx, "loralib": loralib, "scratch": scratch,
    "loratools": native, "cloneofsimo": cloneofsimo, "samlora": samlora, "xlabs": xlabs,
}  # fmt: skip
