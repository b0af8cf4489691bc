"""Stacks of experts in MLX's files: there and back bit for bit, single experts stacked under MLX's names, and what does not stack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError
from loratools.formats import load, save
from loratools.formats.mlx_experts import stacks
from loratools.tensors import to_ref
from tests.files import raw
from tests.formats.test_mlx import CONFIG, adapter
from tests.strategies import randn


def low(seed: int, **more: object) -> LowRank:
    made = LowRank(A=to_ref(randn(2, 6, seed=seed)), B=to_ref(randn(4, 2, seed=seed + 1)), alpha=4.0, layer="linear")
    return replace(made, **more)  # type: ignore[arg-type]


def test_a_stack_there_and_back(tmp_path: Path) -> None:
    stack = "layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{stack}.lora_a": randn(3, 2, 6, seed=0), f"{stack}.lora_b": randn(3, 4, 2, seed=1)}
    tensors |= {"layers.0.q.lora_a": randn(6, 2, seed=2), "layers.0.q.lora_b": randn(2, 4, seed=3)}
    save(load(adapter(tmp_path / "a", tensors)), tmp_path / "b", format="mlx")
    again = load_file(tmp_path / "b" / "adapters.safetensors")
    assert set(again) == set(tensors) and all(raw(again[key]) == raw(tensors[key]) for key in tensors)
    assert CONFIG["lora_parameters"]["scale"] == 10.0
    assert '"mlp.switch_mlp.up_proj"' in (tmp_path / "b" / "adapter_config.json").read_text()


def test_single_experts_stack_under_the_models_names() -> None:
    own: dict[str, Delta] = {f"model.layers.1.mlp.experts.{e}.gate_proj.weight": low(e) for e in range(3)}
    found = stacks(own, ["qwen3_moe"])
    assert list(found) == ["model.layers.1.mlp.switch_mlp.gate_proj.weight"]
    sparse: dict[str, Delta] = {f"model.layers.1.block_sparse_moe.experts.{e}.w{n}.weight": low(e) for e in range(2) for n in (1, 2, 3)}
    expected = {f"model.layers.1.block_sparse_moe.switch_mlp.{leaf}_proj.weight" for leaf in ("gate", "down", "up")}
    assert set(stacks(sparse, ["mixtral"])) == expected
    assert stacks(own, ["another"]) == own


REFUSED: dict[str, tuple[dict[str, Delta], str]] = {
    "of an unknown model": ({"layers.0.mlp.experts.0.up_proj.weight": low(0)}, r"MLX keeps experts in one stack, .* is not known; give"),
    "an expert less": ({"layers.0.x.weight": Stacked(members=(low(0), None))}, r"layers\.0\.x\.weight: MLX has LoRA on all .*expert 1"),
    "ranks that differ": (
        {"layers.0.x.weight": Stacked(members=(low(0), low(0, A=to_ref(randn(1, 6, seed=0)), B=to_ref(randn(4, 1, seed=0)))))},
        "one rank for all modules: found 1, expected 2, as another expert has; resize --rank makes it one",
    ),
    "scales that differ": (
        {"layers.0.x.weight": Stacked(members=(low(0), low(2, alpha=5.0)))}, r"one scale .*: found 2\.5, expected 2\.0.*; rescale --bake"
    ),
    "a stack of another scale": (
        {"layers.0.x.weight": Stacked(members=(low(0),)), "layers.0.y.weight": low(0, alpha=5.0)}, "one scale for all modules"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_stack(tmp_path: Path, case: str) -> None:
    deltas, said = REFUSED[case]
    with pytest.raises(LoratoolsError, match=said):
        save(Adapter(deltas), tmp_path / "out", format="mlx")
