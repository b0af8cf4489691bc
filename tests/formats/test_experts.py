"""Fused experts as each expert's own matrices: llama.cpp's stacks and MLX's hold what peft's LoRA on the fused parameters did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import convert, merge
from loratools.deltas.experts import Experts
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats import load
from loratools.formats._experts import apart, one_above_the_other
from loratools.tensors import read_tensor, to_ref
from tests.files import read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

EXPERTS, WIDTH, SIZE, RANK = 3, 4, 8, 2
BLOCK = "model.layers.0.mlp.experts"
CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS}


def stacks() -> dict[str, Tensor]:
    return {f"{BLOCK}.gate_up_proj": randn(EXPERTS, 2 * WIDTH, SIZE, seed=0), f"{BLOCK}.down_proj": randn(EXPERTS, SIZE, WIDTH, seed=1)}


def adapter(folder: Path, config: dict[str, Any] = CONFIG) -> Path:
    """A base that stores its experts fused, and peft's LoRA on both parameters."""
    write_checkpoint(folder / "base", stacks(), config)
    inner, outer = f"base_model.model.{BLOCK}.base_layer", f"base_model.model.{BLOCK}"
    tensors = {
        f"{inner}.lora_A.weight": randn(EXPERTS * RANK, SIZE, seed=2), f"{inner}.lora_B.weight": randn(2 * WIDTH, RANK * EXPERTS, seed=3),
        f"{outer}.lora_A.weight": randn(EXPERTS * RANK, WIDTH, seed=4), f"{outer}.lora_B.weight": randn(SIZE, RANK * EXPERTS, seed=5),
    }  # fmt: skip
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "target_parameters": names, "peft_version": "0.21.2"}
    return write_adapter(folder / "adapter", tensors, settings)


def changes(folder: Path, source: Path) -> dict[str, Tensor]:
    """What merging a file changes of the fused base."""
    merge(folder / "base", source, folder / "out", overwrite=True, dtype="float64")
    after, before = read_checkpoint(folder / "out"), stacks()
    return {name: after[name] - before[name].double() for name in before}


def test_gguf_of_fused_experts(tmp_path: Path) -> None:
    source = adapter(tmp_path)
    convert(source, tmp_path / "a.gguf", format="gguf", base=tmp_path / "base")
    found = load(tmp_path / "a.gguf")
    assert set(found) == {f"{BLOCK}.{e}.{leaf}_proj.weight" for e in range(EXPERTS) for leaf in ("gate", "up", "down")}
    one, other = changes(tmp_path, source), changes(tmp_path, tmp_path / "a.gguf")
    for name, change in one.items():
        assert change.norm() > 1
        torch.testing.assert_close(other[name], change, rtol=0, atol=1e-12)  # the same products in float64, written as float64


def test_mlx_of_fused_experts(tmp_path: Path) -> None:
    """ΔW[e] = scale·lora_b[e]·lora_a[e] of LoRASwitchLinear, gate and way up apart."""
    source = adapter(tmp_path)
    convert(source, tmp_path / "mlx", format="mlx", base=tmp_path / "base")
    found = load(tmp_path / "mlx")
    place = "model.layers.0.mlp.switch_mlp"
    assert set(found) == {f"{place}.{leaf}_proj.weight" for leaf in ("gate", "up", "down")}
    expected = changes(tmp_path, source)
    made = {name: torch.stack([_dense(low) for low in stack.members]) for name, stack in found.items()}
    gate_up = torch.cat([made[f"{place}.gate_proj.weight"], made[f"{place}.up_proj.weight"]], dim=1)
    torch.testing.assert_close(gate_up, expected[f"{BLOCK}.gate_up_proj"], rtol=0, atol=1e-12)
    torch.testing.assert_close(made[f"{place}.down_proj.weight"], expected[f"{BLOCK}.down_proj"], rtol=0, atol=1e-12)


def _dense(low: Any) -> Tensor:
    return low.scaling * read_tensor(low.B, torch.float64) @ read_tensor(low.A, torch.float64)


def test_of_other_models_a_stack_stays_what_it_is(tmp_path: Path) -> None:
    """gpt_oss' gate and way up alternate: no rows of one stack are the gate's."""
    delta = Experts(A=to_ref(randn(6, 8, seed=0)), B=to_ref(randn(8, 6, seed=1)), alpha=2.0, experts=3)
    deltas = {f"{BLOCK}.gate_up_proj": delta}
    assert apart(deltas, ["gpt_oss"]) == apart(deltas, []) == deltas and len(apart(deltas, ["mixtral"])) == 6
    assert [kind for kind in ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "llama4", "llama") if one_above_the_other(kind)] == [
        "mixtral", "qwen2_moe", "olmoe",
    ]  # fmt: skip
    source = adapter(tmp_path, {"model_type": "gpt_oss"})
    refused = {"gguf": "model_type whose names in GGUF are not known", "mlx": "MLX cannot say a LoRA-of-experts delta; give convert --base"}
    for format, said in refused.items():
        with pytest.raises((NotExpressible, LoratoolsError), match=said):
            convert(source, tmp_path / f"x.{format}", format=format, base=tmp_path / "base")
