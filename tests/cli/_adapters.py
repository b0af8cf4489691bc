"""An adapter for the tiny Llama of tests/conftest.py, and the command line run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.files import peft_config, write_adapter

ROOT = Path(__file__).parents[2]
TARGETS = ("q_proj", "v_proj")


def llama_adapter(folder: Path, *, rank: int = 2, hidden: int = 8, layers: int = 2, **config: Any) -> Path:
    """LoRA on q_proj (square) and v_proj (half as high) of each layer, random from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name in TARGETS:
            root = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{root}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator)
            tensors[f"{root}.lora_B.weight"] = torch.randn(hidden if name == "q_proj" else hidden // 2, rank, generator=generator) / 10
    return write_adapter(folder, tensors, peft_config(r=rank, target_modules=list(TARGETS)) | config)


def loratools(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """`python -m loratools …` in a process of its own, its streams as text."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(), timeout=120, **more)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loratools", *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's own, but for a setting that makes Python drop what a closed pipe did not take without an error."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
