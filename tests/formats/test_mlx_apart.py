"""MLX's stacks met by checkpoints: as one tensor under MLX's name, or as a matrix for each expert, with the same change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import merge
from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError
from loratools.formats.mlx_apart import met
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.interop.trained import recorded
from tests.strategies import randn


def low(seed: int) -> LowRank:
    return LowRank(A=to_ref(randn(2, 6, seed=seed)), B=to_ref(randn(4, 2, seed=seed + 1)), alpha=4.0, layer="linear")


NAMES = {
    "layers.0.mlp.switch_mlp.down_proj": "layers.0.mlp.experts.{}.down_proj",
    "layers.0.mlp.experts.gate_proj": "layers.0.mlp.experts.{}.gate_proj",
    "layers.0.block_sparse_moe.switch_mlp.gate_proj": "layers.0.block_sparse_moe.experts.{}.w1",
    "layers.0.mixer.switch_mlp.fc1": "layers.0.mixer.experts.{}.up_proj",
}


@pytest.mark.parametrize("stack", NAMES)
def test_names(stack: str) -> None:
    members = (low(0), None, low(2))
    deltas: dict[str, Delta] = {f"{stack}.weight": Stacked(members=members), "x.weight": low(4)}
    found = met(deltas, {})
    assert found == {f"{NAMES[stack].format(e)}.weight": members[e] for e in (0, 2)} | {"x.weight": deltas["x.weight"]}
    assert met(deltas, {f"{stack}.weight": Spec("F32", (3, 4, 6))}) == deltas


def test_names_that_are_none_of_mlx() -> None:
    deltas: dict[str, Delta] = {"layers.0.switch.weight": Stacked(members=(low(0),)), "layers.0.mlp.switch_mlp.up_proj.weight": low(1)}
    assert met(deltas, {}) == deltas


def test_a_stack_that_was_saved_whole() -> None:
    W = randn(3, 4, 6, seed=0)
    found = met({"layers.0.mlp.switch_mlp.up_proj.weight": Replacement(value=to_ref(W))}, {})
    for number, delta in enumerate(found.values()):
        assert isinstance(delta, Replacement) and torch.equal(read_tensor(delta.value), W[number])
    assert list(found) == [f"layers.0.mlp.experts.{number}.up_proj.weight" for number in range(3)]


def test_a_checkpoint_that_mlx_saved_takes_the_same_change(tmp_path: Path) -> None:
    base, adapter, _ = recorded("mlx", "mixtral-lora")
    tensors = read_checkpoint(base)
    stacks: dict[str, Any] = {}
    for layer in range(2):
        for part, word in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            names = [f"model.layers.{layer}.block_sparse_moe.experts.{number}.{part}.weight" for number in range(3)]
            stacks[f"model.layers.{layer}.block_sparse_moe.switch_mlp.{word}.weight"] = torch.stack([tensors.pop(name) for name in names])
    write_checkpoint(tmp_path / "base", tensors | stacks, {"model_type": "mixtral"})
    for source, out in ((base, "plain"), (tmp_path / "base", "stacked")):
        receipt = merge(source, adapter, tmp_path / out)
        assert receipt["applied"] == receipt["expected"] > 0
    plain, stacked = read_checkpoint(tmp_path / "plain"), read_checkpoint(tmp_path / "stacked")
    name = "model.layers.1.block_sparse_moe.{}.weight"
    for number in range(3):
        found = stacked[name.format("switch_mlp.down_proj")][number]
        assert torch.equal(found, plain[name.format(f"experts.{number}.w2")])
        assert not torch.equal(found, stacks[name.format("switch_mlp.down_proj")][number])


def test_a_base_without_experts_is_an_error(tmp_path: Path) -> None:
    _, adapter, _ = recorded("mlx", "mixtral-lora")
    with pytest.raises(LoratoolsError, match=r"experts\.0\.w1\.weight: the base has no such weight"):
        merge(recorded("mlx", "llama-lora")[0], adapter, tmp_path / "out")
