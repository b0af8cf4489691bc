"""quantized: each scheme is known by its config or by its tensors, and plain weights are never taken for one."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.quantized import scheme
from loratools.refs import Spec

X = "model.layers.0.mlp.up_proj"
PLAIN = {f"{X}.weight": Spec("BF16", (16, 8)), "model.norm.weight": Spec("BF16", (8,))}
U8, I32, F32 = Spec("U8", (64, 1)), Spec("I32", (2, 8)), Spec("F32", (16,))


# what each scheme's own writer leaves in a file beside, or in place of, a layer's weight
TENSORS: list[tuple[str, dict[str, Spec]]] = [
    ("bitsandbytes nf4", {f"{X}.weight": U8, f"{X}.weight.quant_state.bitsandbytes__nf4": U8, f"{X}.weight.absmax": U8}),
    ("bitsandbytes fp4", {f"{X}.weight": U8, f"{X}.weight.quant_state.bitsandbytes__fp4": U8}),
    ("bitsandbytes 4-bit", {f"{X}.weight": U8, f"{X}.weight.absmax": U8, f"{X}.weight.quant_map": F32}),
    ("bitsandbytes int8", {f"{X}.weight": Spec("I8", (16, 8)), f"{X}.SCB": F32}),
    ("gptq", {f"{X}.g_idx": I32, f"{X}.qweight": I32, f"{X}.qzeros": I32, f"{X}.scales": F32}),
    ("gptq or awq", {f"{X}.qweight": I32, f"{X}.qzeros": I32, f"{X}.scales": F32}),
    ("fp8 with block scales", {f"{X}.weight": Spec("F8_E4M3", (16, 8)), f"{X}.weight_scale_inv": Spec("F32", (1, 1))}),
    ("F8_E4M3 with scales", {f"{X}.weight": Spec("F8_E4M3", (16, 8)), f"{X}.weight_scale": F32}),
    ("I8 with scales", {f"{X}.weight": Spec("I8", (16, 8)), f"{X}.weight_scale": F32}),
    ("U8 with scales", {f"{X}.weight": Spec("U8", (4, 8)), f"{X}.weight_scale": F32}),
    ("F4 with scales", {f"{X}.weight": Spec("F4", (16, 8)), f"{X}.weight_scale": F32}),
    ("compressed-tensors", {f"{X}.weight_packed": I32, f"{X}.weight_scale": F32, f"{X}.weight_shape": Spec("I64", (2,))}),
    ("scaled fp8", {f"{X}.weight": Spec("F8_E4M3", (16, 8)), f"{X}.scale_weight": F32}),
    ("ComfyUI's mixed precision", {f"{X}.weight": Spec("F8_E4M3", (16, 8)), f"{X}.comfy_quant": U8, f"{X}.weight_scale": F32}),
    ("mxfp4", {"experts.gate_up_proj_blocks": U8, "experts.gate_up_proj_scales": U8}),
    ("mlx", {f"{X}.weight": Spec("U32", (16, 1)), f"{X}.scales": F32, f"{X}.biases": F32}),
]
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("awq", {"quantization_config": {"quant_method": "awq"}}),
    ("fp8", {"model_type": "x", "text_config": {"quantization_config": {"quant_method": "fp8"}}}),
    ("bitsandbytes", {"quantization_config": {"load_in_8bit": True}}),
    ("mlx", {"quantization": {"group_size": 64, "bits": 4}}),
    ("mxfp4", {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}),
]


@pytest.mark.parametrize(("name", "more"), TENSORS, ids=[name for name, _ in TENSORS])
def test_known_by_its_tensors(name: str, more: dict[str, Spec]) -> None:
    assert scheme(PLAIN | more, {}) == name


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=[name for name, _ in CONFIGS])
def test_known_by_its_config(name: str, config: dict[str, Any]) -> None:
    assert scheme(PLAIN, config) == name


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ({}, {"quantization_config": None, "quantization": {}, "torch_dtype": "bfloat16"}),
        ({f"{X}.weight": Spec("F8_E4M3", (16, 8))}, {}),  # plain fp8, without scales: a dtype like any other
        ({"decoder.up_blocks.0.weight": F32, "attn.logit_scale": F32, "layer.scales": F32, "norm.weight_scale": F32}, {}),
        ({"transformer_blocks": F32, "position_ids": Spec("I64", (1, 8)), "bn.num_batches_tracked": Spec("I64", ())}, {}),
    ],
)
def test_plain_weights_are_plain(more: dict[str, Spec], config: dict[str, Any]) -> None:
    assert scheme(PLAIN | more, config) is None
