"""Key tables as containers: of published adapters, names and shapes, zeros for data, 1 for alphas; and of formats that name by rule."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

from loratools.formats.base import Container
from loratools.refs import InMemory, Spec

FOLDER = Path(__file__).parent.parent / "data" / "keys"
TABLES = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def container(name: str) -> Container:
    """A recorded table as what a codec sees of a file."""
    table = json.loads(TABLES[name].read_text())
    return Container({key: InMemory(Spec("F32", tuple(shape)), _data(shape)) for key, shape in table.items()})


def _data(shape: list[int]) -> bytes:
    return bytes.fromhex("0000803f") if not shape else b""


# -- formats that name what they adapt by rule: modules of a few layers, and what follows each


def _keys(root: str, modules: str, ends: str, layers: int = 2) -> list[str]:
    return [f"{root.format(layer)}.{module}{end}" for layer, module, end in product(range(layers), modules.split(), ends.split())]


_LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
_TUNE = "attn.q_proj attn.k_proj attn.v_proj attn.output_proj mlp.w1 mlp.w2 mlp.w3"
_BRIDGE = ".linear_in.weight .linear_out.weight"
_OLDER = "model.language_model.encoder.layers.{}"
_CANONICAL = "self_attention.linear_qkv.adapter.adapter_q self_attention.linear_qkv.adapter.adapter_v mlp.linear_fc1.adapter.adapter_up"
MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}}
GGUF = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}

# by format, and what of it: the keys
SPELT: Mapping[str, Iterable[str]] = {
    "torchtune": [*_keys("layers.{}", _TUNE, ".lora_a.weight .lora_b.weight"), "output.lora_a.weight", "output.lora_b.weight"],
    "torchtune DoRA": _keys("layers.{}", _TUNE, ".lora_a.weight .lora_b.weight .magnitude"),
    "litgpt": [*_keys("transformer.h.{}", "attn.qkv attn.proj mlp.fc_1 mlp.fc_2 mlp.proj", ".lora_A .lora_B"), "lm_head.lora_A"],
    "litgpt older": _keys("transformer.h.{}", "attn.attn", ".lora_A .lora_B"),
    "litgpt of experts": _keys("transformer.h.{}", "mlp.experts.0.fc_1 mlp.experts.1.fc_1", ".lora_A .lora_B"),
    "nemo": _keys("decoder.layers.{}", "self_attention.linear_qkv.adapter mlp.linear_fc1.adapter mlp.linear_fc2.adapter", _BRIDGE),
    "nemo canonical": _keys("module.decoder.layers.{}", _CANONICAL, _BRIDGE),
    "nemo DoRA": _keys("decoder.layers.{}", "mlp.linear_fc2.adapter", f"{_BRIDGE} .weight_magnitude"),
    "nemo 1": _keys(_OLDER, "self_attention.adapter_layer.lora_kqv_adapter mlp.adapter_layer.lora_4htoh_adapter", _BRIDGE),
    "mlx": _keys("model.layers.{}", _LLAMA, ".lora_a .lora_b"),
    "mlx DoRA": _keys("model.layers.{}", _LLAMA, ".lora_a .lora_b .m"),
    "gguf": _keys("blk.{}", "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down", ".weight.lora_a .weight.lora_b"),
    "loralib": _keys("roberta.encoder.layer.{}", "attention.self.query attention.self.value", ".lora_A .lora_B"),
    "scratch": _keys("layers.{}", "0 2 4", ".lora.A .lora.B .linear.weight .linear.bias"),
    "cloneofsimo": [*(f"{part}:{n}:{side}" for part in ("unet", "text_encoder") for n in (0, 1) for side in ("up", "down")), "<s1>"],
    "samlora": [*(f"w_{side}_{n:03}" for n in range(4) for side in "ab"), "fc_768in_10out"],
    "xlabs": [
        *_keys("double_blocks.{}.processor", "qkv_lora1 qkv_lora2 proj_lora1 proj_lora2", ".down.weight .up.weight"),
        *_keys("single_blocks.{}.processor", "qkv_lora proj_lora", ".down.weight .up.weight"),
    ],
}  # fmt: skip


def spelt(name: str) -> Container:
    """Such keys as what a codec sees of a file, with what lies beside them or in the file's header."""
    format = name.partition(" ")[0]
    refs = {key: InMemory(Spec("F32", (2, 2)), bytes(16)) for key in SPELT[name]}
    return Container(refs, config=MLX if format == "mlx" else None, fields=GGUF if format == "gguf" else {})
