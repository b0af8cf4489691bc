"""MLX-LM: adapters that it trained and saved are what loratools merges, and what loratools writes is what it loads.

Its own logits lie beside the adapters in tests/data/trained/mlx; where mlx-lm is installed it runs anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import convert, merge
from loratools.errors import LoratoolsError
from loratools.formats import load
from tests.files import peft_config, read_checkpoint, write_adapter, write_checkpoint
from tests.interop.trained import assert_same, cases, hugging_face, logits_of, make_base, merged_logits, peft_adapter, recorded
from tests.strategies import randn

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIVE = 'install mlx-lm and MLX for the CPU: pip install mlx-lm "mlx[cpu]"'


def live() -> Any:
    """MLX-LM run by its own functions."""
    pytest.importorskip("mlx.core", reason=LIVE)
    pytest.importorskip("mlx_lm", reason=LIVE)
    from tests.interop.trainers import with_mlx

    return with_mlx


@pytest.mark.parametrize("case", cases("mlx"))
def test_what_it_trained(tmp_path: Path, case: str) -> None:
    base, adapter, logits = recorded("mlx", case)
    assert load(adapter).format == "mlx"
    assert_same(merged_logits(base, adapter, tmp_path / "out"), logits, logits_of(hugging_face(base)))


@pytest.mark.parametrize("case", cases("mlx"))
def test_what_it_trains(tmp_path: Path, case: str) -> None:
    """Trained now, and as MLX-LM itself loads what it saved."""
    mlx = live()
    base, adapter = recorded("mlx", case)[0], tmp_path / "adapter"
    trained = mlx.train(case, base, adapter)
    assert torch.equal(mlx.logits(base, adapter), trained)
    assert_same(merged_logits(base, adapter, tmp_path / "out"), trained, mlx.logits(base))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_it_loads_what_peft_saved(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    mlx = live()
    make_base(kind, tmp_path / "base")
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", targets=DENSE, **more)
    convert(tmp_path / "peft", tmp_path / "mlx", format="mlx")
    assert_same(mlx.logits(tmp_path / "base", tmp_path / "mlx"), logits, mlx.logits(tmp_path / "base"))


def test_it_loads_an_embedding_and_a_head(tmp_path: Path) -> None:
    mlx = live()
    make_base("llama", tmp_path / "base")
    logits = peft_adapter(tmp_path / "base", tmp_path / "peft", targets=["q_proj", "embed_tokens", "lm_head"])
    convert(tmp_path / "peft", tmp_path / "mlx", format="mlx")
    assert_same(mlx.logits(tmp_path / "base", tmp_path / "mlx"), logits, mlx.logits(tmp_path / "base"))


# -- experts


def expert_adapter(folder: Path, experts: int = 3) -> Path:
    """peft's LoRA of each expert, as it was saved while they were modules of their own."""
    tensors = {}
    for number in range(2 * experts):
        for part, out, width in (("w1", 24, 16), ("w2", 16, 24), ("w3", 24, 16)):
            module = f"base_model.model.model.layers.{number % 2}.block_sparse_moe.experts.{number // 2}.{part}"
            tensors[f"{module}.lora_A.weight"] = randn(2, width, seed=len(tensors)) * 0.5
            tensors[f"{module}.lora_B.weight"] = randn(out, 2, seed=len(tensors)) * 0.5
    return write_adapter(folder, tensors, peft_config(target_modules=rf".*\.experts\.[0-{experts - 1}]\.(w1|w2|w3)"))


def test_it_loads_experts_as_a_stack(tmp_path: Path) -> None:
    mlx = live()
    make_base("mixtral", tmp_path / "base")
    convert(expert_adapter(tmp_path / "peft"), tmp_path / "mlx", format="mlx", base=tmp_path / "base")
    expected = merged_logits(tmp_path / "base", tmp_path / "peft", tmp_path / "out")
    assert_same(mlx.logits(tmp_path / "base", tmp_path / "mlx"), expected, mlx.logits(tmp_path / "base"))


def test_experts_there_and_back(tmp_path: Path) -> None:
    make_base("mixtral", tmp_path / "base")
    convert(expert_adapter(tmp_path / "peft"), tmp_path / "mlx", format="mlx", base=tmp_path / "base")
    convert(tmp_path / "mlx", tmp_path / "back", format="peft", base=tmp_path / "base")
    before, after = (read_checkpoint(tmp_path / name) for name in ("peft", "back"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(LoratoolsError, match="MLX has LoRA on all experts of a stack: found none on expert 2"):
        convert(expert_adapter(tmp_path / "two", 2), tmp_path / "none", format="mlx", base=tmp_path / "base")


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
