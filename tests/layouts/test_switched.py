"""MLX's stacks of experts under the names that a base has of them: stacks, single experts, or fused ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools import convert, merge
from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.layouts.switched import unswitched
from loratools.tensors import read_tensor, to_ref
from tests.files import read_checkpoint, write_checkpoint
from tests.formats.test_experts import BLOCK, CONFIG, EXPERTS, WIDTH, adapter, stacks
from tests.strategies import randn

LEAVES = ("gate_proj", "up_proj", "down_proj")


def low(seed: int) -> LowRank:
    return LowRank(A=to_ref(randn(2, 6, seed=seed)), B=to_ref(randn(4, 2, seed=seed + 1)), alpha=4.0, layer="linear")


def test_one_for_each_expert_under_its_own_name() -> None:
    stack = Stacked(members=(low(0), None, low(2)))
    given: dict[str, Delta] = {"m.0.mlp.switch_mlp.up_proj.weight": stack, "m.0.block_sparse_moe.switch_mlp.gate_proj.weight": stack}
    found = unswitched({**given, "m.0.q.weight": low(4)}, ["m.0.q.weight"])
    assert list(found) == [
        "m.0.mlp.experts.0.up_proj.weight", "m.0.mlp.experts.2.up_proj.weight", "m.0.block_sparse_moe.experts.0.w1.weight",
        "m.0.block_sparse_moe.experts.2.w1.weight", "m.0.q.weight",
    ]  # fmt: skip
    assert unswitched(given, list(given)) is given


def bases(kind: str) -> dict[str, Tensor]:
    """The same experts as files of transformers, of its models in memory, and of MLX have them."""
    fused = stacks()
    gate, up = fused[f"{BLOCK}.gate_up_proj"].split(WIDTH, dim=1)
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": fused[f"{BLOCK}.down_proj"]}
    if kind == "fused":
        return fused
    if kind == "stacks":
        return {f"model.layers.0.mlp.switch_mlp.{leaf}.weight": part.contiguous() for leaf, part in parts.items()}
    return {f"{BLOCK}.{e}.{leaf}.weight": part[e].clone() for leaf, part in parts.items() for e in range(EXPERTS)}


@pytest.mark.parametrize("kind", ["single", "fused", "stacks"])
def test_merged_into_whatever_a_base_calls_them(tmp_path: Path, kind: str) -> None:
    """What peft's LoRA changes of the fused experts, MLX's file of it changes of any spelling of them."""
    convert(adapter(tmp_path), tmp_path / "mlx", format="mlx", base=tmp_path / "base")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected", dtype="float64")
    base = write_checkpoint(tmp_path / kind, bases(kind), CONFIG)
    merge(base, tmp_path / "mlx", tmp_path / "out", dtype="float64")
    expected, found = read_checkpoint(tmp_path / "expected"), read_checkpoint(tmp_path / "out")
    if kind == "single":
        parts = {leaf: torch.stack([found[f"{BLOCK}.{e}.{leaf}.weight"] for e in range(EXPERTS)]) for leaf in LEAVES}
    elif kind == "stacks":
        parts = {leaf: found[f"model.layers.0.mlp.switch_mlp.{leaf}.weight"] for leaf in LEAVES}
    else:
        gate, up = found[f"{BLOCK}.gate_up_proj"].split(WIDTH, dim=1)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": found[f"{BLOCK}.down_proj"]}
    gate_up = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
    torch.testing.assert_close(gate_up, expected[f"{BLOCK}.gate_up_proj"], rtol=0, atol=1e-12)  # the same products in float64
    torch.testing.assert_close(parts["down_proj"], expected[f"{BLOCK}.down_proj"], rtol=0, atol=1e-12)


NAMES = {
    "layers.0.mlp.experts.gate_proj": "layers.0.mlp.experts.{}.gate_proj",
    "layers.0.feed_forward.switch_mlp.down_proj": "layers.0.feed_forward.experts.{}.down_proj",
    "layers.0.mixer.switch_mlp.fc1": "layers.0.mixer.experts.{}.up_proj",
    "layers.0.mixer.switch_mlp.fc2": "layers.0.mixer.experts.{}.down_proj",
}


@pytest.mark.parametrize("stack", NAMES)
def test_other_places_of_a_stack(stack: str) -> None:
    members = (low(0), None, low(2))
    deltas: dict[str, Delta] = {f"{stack}.weight": Stacked(members=members), "x.weight": low(4)}
    found = unswitched(deltas, [])
    assert found == {f"{NAMES[stack].format(e)}.weight": members[e] for e in (0, 2)} | {"x.weight": deltas["x.weight"]}
    assert unswitched(deltas, [f"{stack}.weight"]) == deltas


def test_names_that_are_none_of_mlx() -> None:
    deltas: dict[str, Delta] = {"layers.0.switch.weight": Stacked(members=(low(0),)), "layers.0.mlp.switch_mlp.up_proj.weight": low(1)}
    assert unswitched(deltas, []) == deltas


def test_a_stack_that_was_saved_whole() -> None:
    W = randn(3, 4, 6, seed=0)
    found = unswitched({"layers.0.mlp.switch_mlp.up_proj.weight": Replacement(value=to_ref(W))}, [])
    assert list(found) == [f"layers.0.mlp.experts.{number}.up_proj.weight" for number in range(3)]
    for number, delta in enumerate(found.values()):
        assert isinstance(delta, Replacement) and torch.equal(read_tensor(delta.value), W[number])
