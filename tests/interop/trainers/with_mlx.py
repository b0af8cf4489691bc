"""MLX-LM: its trainer, its saver, its loader, its forward."""

from __future__ import annotations

import io
import types
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.lora import CONFIG_DEFAULTS, train_model
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from torch import Tensor

from tests.interop.trained import STEP, TOKENS, steps

ATTENTION = [f"self_attn.{side}_proj" for side in "qkvo"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # the base, and what of `mlx_lm.lora`'s options is not its default
    "llama-lora": ("llama", {"keys": None}),
    "llama-dora": ("llama", {"keys": None, "fine_tune_type": "dora"}),
    "llama-ends": ("llama", {"keys": [*ATTENTION, "model.embed_tokens", "lm_head"], "num_layers": 1}),
    "llama-dora_ends": ("llama", {"keys": [*MLP, "model.embed_tokens", "lm_head"], "fine_tune_type": "dora"}),
    "llama-full": ("llama", {"fine_tune_type": "full", "num_layers": 1}),
    "qwen2-lora": ("qwen2", {"keys": [*ATTENTION, *MLP]}),
    "qwen2-dora": ("qwen2", {"keys": [*ATTENTION, *MLP], "fine_tune_type": "dora"}),
    "mixtral-lora": ("mixtral", {"keys": None}),
    "mixtral-full": ("mixtral", {"fine_tune_type": "full", "num_layers": 1}),
    "tied-lora": ("tied", {"keys": [*MLP, "model.embed_tokens"]}),
    "tied-dora": ("tied", {"keys": ["self_attn.v_proj", "model.embed_tokens"], "fine_tune_type": "dora"}),
    "gpt2-lora": ("gpt2", {"keys": None}),
}


def train(case: str, base: Path, adapter: Path) -> Tensor:
    """Two steps of `mlx_lm.lora`, which saves the adapter; returns the logits of the model in memory."""
    _, told = CASES[case]
    model, _ = load_model(base)
    settings = {name: value for name, value in told.items() if name != "keys"}
    lora = {"rank": 4, "scale": 3.0, "dropout": 0.0} | ({"keys": told["keys"]} if told.get("keys") else {})
    args = types.SimpleNamespace(**{
        **CONFIG_DEFAULTS, "model": "tiny", "train": True, "num_layers": -1, "batch_size": 2, "iters": 2, "learning_rate": STEP,
        "val_batches": 0, "steps_per_eval": 100, "adapter_path": str(adapter), "lora_parameters": lora, **settings,
    })  # fmt: skip
    data = [(row.tolist(), 0) for batch in steps() for row in batch]
    with redirect_stdout(io.StringIO()):
        train_model(args, model, _Data(data), _Data(data))
    for file in adapter.glob("0*_adapters.safetensors"):
        file.unlink()
    return forward(model)


class _Data:
    """What `create_dataset` makes of texts, where tokens are there already."""

    def __init__(self, rows: list[tuple[list[int], int]]) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def process(self, row: tuple[list[int], int]) -> tuple[list[int], int]:
        return row


def forward(model: Any) -> Tensor:
    model.eval()
    return torch.from_numpy(np.array(model(mx.array(TOKENS.numpy())))).double()


def logits(base: Path, adapter: Path | None = None) -> Tensor:
    """The logits of a base with an adapter, both loaded by MLX-LM."""
    model, _ = load_model(base)
    return forward(model if adapter is None else load_adapters(model, str(adapter)))


def parameters(base: Path) -> dict[str, tuple[int, ...]]:
    """MLX's names of a model's weights and their shapes."""
    return {name: value.shape for name, value in tree_flatten(load_model(base)[0].parameters())}
