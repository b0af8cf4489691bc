"""What is odd about an adapter, told by inspect: from its headers, and from its values where they are asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import inspect
from loratools.adapter import Adapter
from loratools.deltas.full import Full
from loratools.ops._oddities import as_a_whole, scan
from loratools.tensors import to_ref
from tests.cli._adapters import llama_adapter
from tests.files import lora, peft_config, write_adapter

ROOT = "base_model.model."


@pytest.mark.parametrize(
    ("config", "warning"),
    [
        ({"lora_alpha": 0}, "q_proj.weight: alpha is 0, so it changes nothing"),
        ({"lora_alpha": -2}, "q_proj.weight: the scaling is negative (-1): what was trained is subtracted"),
        ({"lora_alpha": 512}, "the scaling is very large (256)"),
        ({"alpha_pattern": {"k_proj": 3}}, "alpha_pattern names k_proj, and the file has nothing there"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "target_modules names o_proj, and the file has nothing there"),
        ({"modules_to_save": ["score"]}, "modules_to_save names score, and the file has nothing there"),
        ({"r": None}, "lacks r"),
        ({"base_model_name_or_path": "/home/trainer/models/tiny"}, "its base is named by a path on another machine"),
        ({"base_model_name_or_path": "C:\\models\\tiny"}, "its base is named by a path on another machine"),
    ],
)
def test_warns_of(tmp_path: Path, config: dict[str, Any], warning: str) -> None:
    found = inspect(llama_adapter(tmp_path / "adapter", **config))["warnings"]
    assert any(warning in text for text in found), found


def test_the_tasks_own_heads_are_not_missed(tmp_path: Path) -> None:
    assert inspect(llama_adapter(tmp_path / "adapter", task_type="SEQ_CLS"))["warnings"] == []


def test_warns_of_a_rank_beyond_the_weights(tmp_path: Path) -> None:
    tensors = lora("q", torch.ones(9, 8), torch.ones(4, 9))
    report = inspect(write_adapter(tmp_path / "adapter", tensors, peft_config(r=9, target_modules=["q"])))
    assert report["warnings"] == ["q.weight: rank 9 is more than a 4 × 8 weight can have"]


def test_warns_of_a_file_that_is_mostly_saved_whole(tmp_path: Path) -> None:
    tensors = lora("q", torch.ones(2, 8), torch.ones(4, 2)) | {f"{ROOT}embed_tokens.base_layer.weight": torch.ones(100, 8)}
    tensors |= {f"{ROOT}embed_tokens.lora_embedding_A": torch.ones(2, 100), f"{ROOT}embed_tokens.lora_embedding_B": torch.ones(8, 2)}
    tensors |= {f"{ROOT}lm_head.weight": torch.ones(1000, 8)}
    report = inspect(write_adapter(tmp_path / "adapter", tensors, peft_config(target_modules=["q", "embed_tokens"])))
    assert any("tensors saved whole, most of them lm_head.weight" in text for text in report["warnings"])


@pytest.mark.parametrize(("marker", "place"), [("lora_A", "A"), ("lora_B", "B")])
def test_warns_of_a_zero_factor(tmp_path: Path, marker: str, place: str) -> None:
    tensors = lora("q", torch.ones(2, 8), torch.ones(4, 2))
    tensors[f"{ROOT}q.{marker}.weight"].zero_()
    adapter = write_adapter(tmp_path / "adapter", tensors, peft_config(target_modules=["q"]))
    assert inspect(adapter)["warnings"] == []
    assert inspect(adapter, values=True)["warnings"] == [f"q.weight: {place} is zero, so it changes nothing: was it trained?"]
    assert inspect(adapter, spectra=True)["modules"][0]["norm"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_warns_of_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    A = torch.ones(2, 600_000, dtype=dtype)  # more than a block of 1 MiB
    A[0, 0] = A[1, -1] = value
    adapter = write_adapter(tmp_path / "adapter", lora("q", A, torch.ones(4, 2, dtype=dtype)), peft_config(target_modules=["q"]))
    assert inspect(adapter, values=True)["warnings"] == ["q.weight: A has 2 non-finite values"]
    (row,) = inspect(adapter, spectra=True)["modules"]
    assert (row["norm"], row["sigma"], row["effective_rank"]) == (None, None, None)


def test_warns_of_what_changes_no_weight() -> None:
    one = to_ref(torch.ones(2))
    (warning,) = as_a_whole(Adapter({"w": Full(diff=one)}, passengers={"emb_params": one, "<x>": one}))
    assert warning == "2 tensors change no weight: emb_params, <x>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_values_are_counted_in_any_dtype(dtype: torch.dtype) -> None:
    values = torch.zeros(5)
    assert scan(to_ref(values.to(dtype))) == (0, True)
    values[1], values[3] = 1.0, math.nan
    assert scan(to_ref(values.to(dtype))) == (1, False)
