"""litgpt: its conversion of a checkpoint, its LoRA, its saver, its merge, as `litgpt/finetune/lora.py` puts them together."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import litgpt
import litgpt.model
import torch
from litgpt.finetune.lora import save_lora_checkpoint, setup
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.parser_config import save_hyperparameters
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.merge_lora import load_lora_metadata, merge_lora
from litgpt.utils import copy_config_files
from torch import Tensor

from tests.interop.trained import STEP, TOKENS, steps

EVERY = ("query", "key", "value", "projection", "mlp", "head")
NAMES = {  # litgpt's config of each kind, made small
    "llama": "Llama-3-8B", "qwen2": "Qwen2.5-0.5B", "qwen3": "Qwen3-0.6B", "phi3": "Phi-3-mini-4k-instruct", "gpt_neox": "pythia-14m",
    "mixtral": "Mixtral-8x7B-v0.1", "gemma": "Gemma-7b",
}  # fmt: skip
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama-lora": ("llama", EVERY),
    "llama-some": ("llama", ("query", "value")),
    "qwen2-lora": ("qwen2", EVERY),
    "qwen3-lora": ("qwen3", ("query", "key", "value", "projection")),
    "phi3-lora": ("phi3", EVERY),
    "gpt_neox-lora": ("gpt_neox", EVERY),
    "gpt_neox-some": ("gpt_neox", ("query", "value", "mlp")),
    "mixtral-lora": ("mixtral", ("value", "projection", "mlp")),
    "gemma-lora": ("gemma", ("query", "key", "mlp")),
}
RANK, ALPHA = 4, 12


def checkpoint(base: Path, folder: Path) -> Path:
    """A base as litgpt converts it, in a folder by the name that litgpt knows such models by."""
    told = json.loads((base / "config.json").read_text())
    name = NAMES[told["model_type"]]
    if (folder / name).exists():
        return folder / name
    shutil.copytree(base, folder / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name / file).write_text("{}")
    small: dict[str, Any] = {
        "block_size": 64, "vocab_size": told["vocab_size"], "padded_vocab_size": told["vocab_size"], "n_layer": told["num_hidden_layers"],
        "n_head": told["num_attention_heads"], "n_query_groups": told.get("num_key_value_heads", told["num_attention_heads"]),
        "n_embd": told["hidden_size"], "intermediate_size": told["intermediate_size"],
        "head_size": told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"],
        "rope_base": int(told.get("rope_theta", 10000)), "norm_eps": told.get("rms_norm_eps", told.get("layer_norm_eps")),
        "rope_adjustments": None,
    }  # fmt: skip
    small |= {"n_expert": 3, "n_expert_per_token": 2} if told["model_type"] == "mixtral" else {}
    made = partial(litgpt.Config.from_name, **small)
    with patch("litgpt.scripts.convert_hf_checkpoint.Config.from_name", made), redirect_stdout(StringIO()):
        convert_hf_checkpoint(folder / name)
    return folder / name


def train(case: str, base: Path, adapter: Path) -> Tensor:
    """Two steps, saved as the end of `litgpt finetune lora` does; returns the logits of the model in memory."""
    work = Path(tempfile.mkdtemp())
    lit, on = checkpoint(base, work), CASES[case][1]
    argv = ["litgpt", str(lit), "--lora_r", str(RANK), "--lora_alpha", str(ALPHA), "--lora_dropout", "0.0"]
    for slot in EVERY:
        argv += [f"--lora_{slot}", str(slot in on).lower()]
    torch.manual_seed(0)
    enabled = {f"lora_{slot}": slot in on for slot in EVERY}
    model = GPT(Config.from_file(lit / "model_config.yaml", lora_r=RANK, lora_alpha=ALPHA, **enabled))
    mark_only_lora_as_trainable(model)
    model.load_state_dict(torch.load(lit / "lit_model.pth"), strict=False)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=STEP)
    for batch in steps():
        logits = model(batch)[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.mkdir(parents=True)
    save_lora_checkpoint(lightning.Fabric(devices=1, accelerator="cpu"), model, adapter / "lit_model.pth.lora")
    copy_config_files(lit, adapter)
    with patch.object(sys, "argv", argv):
        save_hyperparameters(setup, adapter)
    text = (adapter / "hyperparameters.yaml").read_text()
    (adapter / "hyperparameters.yaml").write_text(text.replace(str(work), "checkpoints"))
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (adapter / file).unlink()
    shutil.rmtree(work)
    return forward(model)


def forward(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(TOKENS)
    return found.double()


def plain(base: Path) -> Tensor:
    """The logits of a base alone."""
    with tempfile.TemporaryDirectory() as work:
        lit = checkpoint(base, Path(work))
        model = litgpt.model.GPT(litgpt.Config.from_file(lit / "model_config.yaml"))
        model.load_state_dict(torch.load(lit / "lit_model.pth"))
        return forward(model)


def logits(base: Path, adapter: Path) -> tuple[Tensor, Tensor]:
    """The logits of a base with an adapter: loaded beside it, and merged into it by `litgpt merge_lora`."""
    with tempfile.TemporaryDirectory() as work:
        lit, folder = checkpoint(base, Path(work)), Path(work) / "adapter"
        shutil.copytree(adapter, folder)
        for file in ("model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(lit / file, folder)
        told, _, _ = load_lora_metadata(folder)
        model = GPT(Config.from_file(folder / "model_config.yaml", **told))
        tensors = torch.load(lit / "lit_model.pth") | torch.load(folder / "lit_model.pth.lora")["model"]
        model.load_state_dict(tensors)
        beside = forward(model)
        with redirect_stdout(StringIO()):
            merge_lora(folder, lit, precision="32-true")
        merged = litgpt.model.GPT(litgpt.Config.from_file(folder / "model_config.yaml"))
        merged.load_state_dict(torch.load(folder / "lit_model.pth"))
        return beside, forward(merged)
