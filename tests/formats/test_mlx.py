"""MLX: transposed factors, a scale that is used as it is, its two eras, stacks of experts, DoRA; written and read again bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools import merge
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, NotExpressible, ShapeError
from loratools.formats import load, save
from loratools.formats.base import ReadOptions
from loratools.tensors import read_tensor
from tests.files import peft_config, raw, read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

CONFIG: dict[str, Any] = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 2, "scale": 10.0, "dropout": 0.0}}
A, B = randn(6, 2, seed=0), randn(2, 4, seed=1)
W = randn(4, 6, seed=2)


def adapter(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(folder: Path, tensors: dict[str, Tensor], weight: Tensor, name: str = "q", **config: Any) -> Tensor:
    base = write_checkpoint(folder / "base", {f"layers.0.{name}.weight": weight.double()})
    given = {f"layers.0.{name}.{slot}": tensor for slot, tensor in tensors.items()}
    merge(base, adapter(folder / "a", given, CONFIG | config), folder / "out")
    return read_checkpoint(folder / "out")[f"layers.0.{name}.weight"]


def test_linear_embedding_and_dora(tmp_path: Path) -> None:
    V = W.double() + 10 * (A.double() @ B.double()).T
    assert torch.allclose(merged(tmp_path / "linear", {"lora_a": A, "lora_b": B}, W), V, rtol=1e-12, atol=1e-12)
    table = randn(6, 4, seed=5)
    found = merged(tmp_path / "embedding", {"lora_a": A, "lora_b": B}, table, "embed_tokens")
    assert torch.allclose(found, table.double() + 10 * A.double() @ B.double(), rtol=1e-12, atol=1e-12)
    m = 1 + randn(4, seed=3).square()
    found = merged(tmp_path / "dora", {"lora_a": A, "lora_b": B, "m": m}, W, fine_tune_type="dora")
    assert torch.allclose(found, m.double()[:, None] * V / V.norm(dim=1, keepdim=True), rtol=1e-12, atol=1e-12)


def test_a_stack_of_experts_is_not_transposed(tmp_path: Path) -> None:
    a, b, stack = randn(3, 2, 6, seed=0), randn(3, 4, 2, seed=1), randn(3, 4, 6, seed=2)
    found = merged(tmp_path, {"lora_a": a, "lora_b": b}, stack, "switch")
    assert torch.allclose(found, stack.double() + 10 * b.double() @ a.double(), rtol=1e-12, atol=1e-12)


def test_a_full_fine_tune_is_whole_tensors(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"q.weight": W})
    merge(base, adapter(tmp_path / "a", {"q.weight": W + 1}, {"fine_tune_type": "full", "num_layers": 1}), tmp_path / "out")
    assert torch.equal(read_checkpoint(tmp_path / "out")["q.weight"], W + 1)


def scaling(folder: Path, config: dict[str, Any] | None, **options: Any) -> float:
    found = load(adapter(folder, {"q.lora_a": A, "q.lora_b": B}, config), options=ReadOptions(**options))["q.weight"]
    assert isinstance(found, LowRank)
    return found.scaling


OLD = {"lora_layers": 4, "lora_parameters": {"rank": 2, "scale": 10.0, "alpha": 16.0}}


def test_the_eras_of_the_scale(tmp_path: Path) -> None:
    assert scaling(tmp_path / "new", CONFIG | {"lora_parameters": {"rank": 2, "scale": 10.0, "alpha": 16}}) == 10.0
    assert scaling(tmp_path / "direct", OLD, scale="alpha") == 10.0 and scaling(tmp_path / "old", OLD, scale="alpha/r") == 80.0
    with pytest.raises(AmbiguousError, match=r"until June 2024.*found scale 10, alpha 16\.0.*--scale alpha"):
        scaling(tmp_path / "open", OLD)
    assert scaling(tmp_path / "given", None, alpha=20.0) == 20.0
    with pytest.raises(AmbiguousError, match="--alpha-in"):
        scaling(tmp_path / "bare", None)


def test_archives_of_numpy(tmp_path: Path) -> None:
    np.savez(tmp_path / "adapters.npz", **{"q.lora_a": A.numpy(), "q.lora_b": B.numpy()})
    found = load(tmp_path, options=ReadOptions(alpha=20.0))["q.weight"]
    assert isinstance(found, LowRank) and found.scaling == 20.0 and torch.equal(read_tensor(found.A), A.T)
    np.savez(tmp_path / "objects.npz", x=np.array([None]))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "empty.npz").touch()
    for name in ("objects.npz", "broken.npz", "empty.npz"):
        with pytest.raises(FormatError, match="not an archive of arrays"):
            load(tmp_path / name)


def test_a_base_that_stores_its_weights_transposed(tmp_path: Path) -> None:
    """transformers' GPT-2: MLX's has (out, in), and the base's model tells the other way, also of a square."""
    square, a, b = randn(6, 6, seed=3), randn(6, 2, seed=4), randn(2, 6, seed=5)
    base = write_checkpoint(tmp_path / "base", {"h.0.attn.c_proj.weight": square}, {"model_type": "gpt2"})
    given = adapter(tmp_path / "a", {"h.0.attn.c_proj.lora_a": a, "h.0.attn.c_proj.lora_b": b})
    merge(base, given, tmp_path / "out")
    expected = square.double() + 10 * a.double() @ b.double()
    found = read_checkpoint(tmp_path / "out")["h.0.attn.c_proj.weight"]
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-6 * float(expected.norm()))


PAIR = {"q.lora_a": A, "q.lora_b": B}
FAULTS: dict[str, tuple[dict[str, Tensor], dict[str, Any], type[LoratoolsError], str]] = {
    "no partner": ({"q.lora_a": A}, CONFIG, FormatError, "q.lora_a: has no lora_b beside it"),
    "another fine-tuning": (PAIR, CONFIG | {"fine_tune_type": "prefix"}, LoratoolsError, "found prefix, expected lora, dora or full"),
    "no table": (PAIR, CONFIG | {"lora_parameters": [1]}, FormatError, "lora_parameters: found [1], expected an object"),
    "no number": (PAIR, CONFIG | {"lora_parameters": {"rank": 2, "scale": math.nan}}, FormatError, "scale: found nan"),
    "a rank that is none": (PAIR, CONFIG | {"lora_parameters": {"rank": 2.5, "scale": 1}}, ShapeError, "expected 2.5"),
    "a stray": ({"q.lora_a": A, "q.lora_b": B, "norm.weight": W}, CONFIG, FormatError, "norm.weight: not a key MLX writes"),
    "factors turned": ({"q.lora_a": A.T, "q.lora_b": B.T}, CONFIG, ShapeError, "lora_a and lora_b do not meet"),
    "another rank": (
        {"q.lora_a": A, "q.lora_b": B}, CONFIG | {"lora_parameters": {"rank": 4, "scale": 1.0}}, ShapeError, "found 2, expected 4"
    ),
    "no magnitude": ({"q.lora_a": A, "q.lora_b": B}, CONFIG | {"fine_tune_type": "dora"}, FormatError, "has no m"),
    "a magnitude of another size": (
        {"q.lora_a": A, "q.lora_b": B, "q.m": torch.ones(6)}, CONFIG, ShapeError, r"the magnitude does not fit"
    ),
    "a scale that is a word": (
        {"q.lora_a": A, "q.lora_b": B}, CONFIG | {"lora_parameters": {"scale": "10"}}, FormatError, "lora_parameters.scale"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_tensor(tmp_path: Path, name: str) -> None:
    tensors, config, error, text = FAULTS[name]
    with pytest.raises(error) as caught:
        load(adapter(tmp_path / "a", tensors, config))
    assert text in str(caught.value)


def test_written_and_read_again_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.q_proj.lora_a": A, "model.layers.0.self_attn.q_proj.lora_b": B}
    tensors |= {"model.embed_tokens.lora_a": randn(9, 2, seed=4), "model.embed_tokens.lora_b": randn(2, 6, seed=5)}
    save(load(adapter(tmp_path / "a", tensors)), tmp_path / "b", format="mlx")
    from safetensors.torch import load_file

    again, config = load_file(tmp_path / "b/adapters.safetensors"), json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert again.keys() == tensors.keys() and all(raw(again[key]) == raw(tensors[key]) for key in tensors)
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 2)
    assert config["lora_parameters"] == {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": ["model.embed_tokens", "self_attn.q_proj"]}


def test_what_mlx_cannot_say(tmp_path: Path) -> None:
    root, sides = "base_model.model.", {"A": (2, 6), "B": (4, 2)}
    tensors = {f"{root}{module}.lora_{side}.weight": randn(*shape, seed=1) for module in "qk" for side, shape in sides.items()}
    config = peft_config(target_modules=["q", "k"])
    folder = write_adapter(tmp_path / "same", tensors, config)
    save(load(folder), tmp_path / "out", format="mlx")
    found = load(tmp_path / "out")["q.weight"]
    assert isinstance(found, LowRank) and found.scaling == 2.0
    mixed = write_adapter(tmp_path / "mixed", tensors, config | {"alpha_pattern": {"k": 3}})
    with pytest.raises(NotExpressible, match=r"one scale for all modules: .*; rescale --bake"):
        save(load(mixed), tmp_path / "no", format="mlx")
    narrow = tensors | {f"{root}k.lora_A.weight": randn(1, 6, seed=1), f"{root}k.lora_B.weight": randn(4, 1, seed=1)}
    with pytest.raises(NotExpressible, match=r"one rank for all modules: .*; resize --rank"):
        save(load(write_adapter(tmp_path / "narrow", narrow, config | {"rank_pattern": {"k": 1}})), tmp_path / "no", format="mlx")
    whole = write_adapter(tmp_path / "whole", tensors | {f"{root}head.weight": W}, config | {"modules_to_save": ["head"]})
    with pytest.raises(NotExpressible, match=r"head\.weight: MLX cannot say a replacement delta"):
        save(load(whole), tmp_path / "no", format="mlx")
