"""peft 0.21.2, live, as the oracle of merge: what it saves is merged from disk and compared with its own forward.

Forwards are compared in float64, so what differs is what was written: weights rounded once to the base's dtype.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loratools import merge
from tests.files import read_checkpoint
from tests.interop.zoo import TARGETS, TRANSPOSED, difference, inputs, merged_outputs, new_base, outputs, randomize, wrap

# half a unit in the last place of each weight, over a sum of random signs: 2**-24 in float32, 2**-8 in bfloat16 (both relative
# to ‖output‖, with room for outputs that cancel)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    errors = difference(found, expected)
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    zoo = new_base(tmp_path / "base", dtype)
    before = outputs(new_base(tmp_path / "unused", dtype))
    model = wrap(zoo, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=TARGETS, **KINDS[kind])
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=TRANSPOSED)
    assert receipt["applied"] == receipt["expected"] == len(TARGETS)
    expected = outputs(model)
    check(merged_outputs(tmp_path / "out"), expected, dtype)
    assert min(difference({name: before[name] for name in TARGETS}, {name: expected[name] for name in TARGETS}).values()) > 0.05


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_patterns(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Ranks and alphas by regular expression, the first that matches: a `.` in one is any character."""
    zoo = new_base(tmp_path / "base", dtype)
    patterns = {
        "rank_pattern": {"conv.": 3, "conv1": 7, "^linear": 1, "gpt": 5},
        "alpha_pattern": {"point2|square": 2.5, "(.*)3": 11, "conv3": 1},
    }
    model = wrap(zoo, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=TARGETS, **patterns, **KINDS[kind])
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=TRANSPOSED)
    assert model.base_model.model.conv1.r == {"default": 3} and model.base_model.model.conv3.lora_alpha == {"default": 11}
    check(merged_outputs(tmp_path / "out"), outputs(model), dtype)


@DTYPES
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_saved_modules(tmp_path: Path, kind: str, bias: str, dtype: torch.dtype) -> None:
    zoo = new_base(tmp_path / "base", dtype)
    config = {"target_modules": TARGETS, "bias": bias, "modules_to_save": ["head", "norm"] if bias == "lora_only" else None, **KINDS[kind]}
    model = wrap(zoo, tmp_path / "adapter", r=4, lora_alpha=6, **config)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=TRANSPOSED)
    check(merged_outputs(tmp_path / "out"), outputs(model), dtype)
    changed = {row["name"] for row in receipt["tensors"]}
    assert {"linear.bias", "conv3.bias"} <= changed and "norm.bias" in changed and ("head.weight" in changed) == (bias == "lora_only")


@DTYPES
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_lora_bias(tmp_path: Path, bias: str, rslora: bool, dtype: torch.dtype) -> None:
    """The bias of lora_B is a difference and is scaled; beside bias="all" it comes on top of the saved bias."""
    zoo = new_base(tmp_path / "base", dtype)
    targets = [name for name in TARGETS if name != "table"]
    model = wrap(zoo, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=targets, lora_bias=True, use_rslora=rslora, bias=bias)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=TRANSPOSED)
    assert ("chain" in {row["kind"] for row in receipt["tensors"]}) == (bias == "all")
    check(merged_outputs(tmp_path / "out"), outputs(model), dtype)


@DTYPES
def test_several_adapters_with_strengths(tmp_path: Path, dtype: torch.dtype) -> None:
    """W + Σ sᵢ·(applyᵢ(W) − W) for LoRA, rsLoRA and DoRA together: outputs are linear in W, so peft's combine likewise."""
    strengths = {"lora": 0.75, "rslora": -0.5, "dora": 1.5}
    base = outputs(new_base(tmp_path / "base", dtype))
    expected = {name: value.clone() for name, value in base.items()}
    for seed, (kind, strength) in enumerate(strengths.items()):
        zoo = new_base(tmp_path / "unused", dtype)
        model = wrap(zoo, tmp_path / kind, seed=seed, r=2 + seed, lora_alpha=3, target_modules=TARGETS, **KINDS[kind])
        for name, value in outputs(model).items():
            expected[name] += strength * (value - base[name])
    adapters = [f"{tmp_path / kind}:{strength}" for kind, strength in strengths.items()]
    receipt = merge(tmp_path / "base", adapters, tmp_path / "out", transposed=TRANSPOSED)
    assert receipt["applied"] == receipt["expected"] == 3 * len(TARGETS)
    check(merged_outputs(tmp_path / "out"), expected, dtype)


@DTYPES
def test_two_active_adapters_of_one_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """peft's own sum: two adapters active at once, each saved in a folder of its name.

    The DoRA comes first: peft applies a later one to what the earlier ones made, which is no sum.
    """
    zoo = new_base(tmp_path / "base", dtype)
    model = wrap(zoo, tmp_path / "saved", r=4, use_dora=True, target_modules=TARGETS)
    model.add_adapter("second", LoraConfig(r=2, use_rslora=True, target_modules=["linear", "conv2", "table", "gpt"]))
    randomize(model, 5)
    model.save_pretrained(tmp_path / "saved")
    model.base_model.set_adapter(["default", "second"])
    merge(tmp_path / "base", [tmp_path / "saved", tmp_path / "saved/second"], tmp_path / "out", transposed=TRANSPOSED)
    check(merged_outputs(tmp_path / "out"), outputs(model), dtype)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_factors_in_the_base_dtype_and_in_float32(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """autocast_adapter_dtype decides what peft stores; both mean the same."""
    for autocast in (True, False):
        zoo = new_base(tmp_path / "base", dtype)
        model = get_peft_model(zoo, LoraConfig(r=4, target_modules=TARGETS, **KINDS[kind]), autocast_adapter_dtype=autocast)
        randomize(model)
        model.eval().save_pretrained(tmp_path / f"adapter{autocast}")
        stored = read_checkpoint(tmp_path / f"adapter{autocast}")["base_model.model.linear.lora_A.weight"].dtype
        assert stored == (torch.float32 if autocast else dtype)
        out = tmp_path / f"out{autocast}"
        merge(tmp_path / "base", tmp_path / f"adapter{autocast}", out, transposed=TRANSPOSED)
        check(merged_outputs(out), outputs(model), dtype)


def test_the_oracle_sees_what_it_should(tmp_path: Path) -> None:
    """The comparison itself can fail: an alpha off by 0.2 % is far outside for every layer, the others agree exactly."""
    zoo = new_base(tmp_path / "base", torch.float32)
    model = wrap(zoo, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=TARGETS)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6.01}))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=TRANSPOSED)
    errors = difference(merged_outputs(tmp_path / "out"), outputs(model))
    assert min(errors[name] for name in TARGETS) > 1e-5
    assert set(inputs(7)) == {*TARGETS, "norm", "head", "even2"} and errors["norm"] == errors["head"] == errors["even2"] == 0
