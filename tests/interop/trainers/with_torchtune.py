"""torchtune: its models, its LoRA and DoRA, its checkpointer, as `recipes/lora_finetune_single_device.py` puts them together."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune import training
from torchtune.models.gemma import lora_gemma
from torchtune.models.llama3 import lora_llama3
from torchtune.models.phi3 import lora_phi3
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules.peft import (
    get_adapter_params,
    get_adapter_state_dict,
    get_lora_module_names,
    get_merged_lora_ckpt,
    set_trainable_params,
    validate_missing_and_unexpected_for_lora,
)
from torchtune.training import FullModelHFCheckpointer
from torchtune.training.checkpointing._utils import safe_torch_load

from tests.interop.trained import STEP, TOKENS, steps

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
BUILDERS: dict[str, tuple[Callable[..., Any], str]] = {  # and torchtune's ModelType
    "llama": (lora_llama3, "LLAMA3"), "qwen2": (lora_qwen2, "QWEN2"), "gemma": (lora_gemma, "GEMMA"), "phi3": (lora_phi3, "PHI3_MINI"),
}  # fmt: skip
EVERY = {"modules": ATTENTION, "mlp": True, "output": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-lora": ("llama", EVERY),
    "llama-dora": ("llama", EVERY | {"dora": True}),
    "llama-some": ("llama", {"modules": ["q_proj", "v_proj"]}),
    "qwen2-lora": ("qwen2", EVERY),
    "qwen2-dora": ("qwen2", {"modules": ["output_proj"], "mlp": True, "dora": True}),  # modules without a bias
    "qwen2-biased": ("qwen2", {"modules": ["q_proj", "k_proj"], "dora": True}),
    "gemma-lora": ("gemma", {"modules": ATTENTION, "mlp": True}),
    "phi3-lora": ("phi3", EVERY),
}
RANK, ALPHA = 4, 12


def _checkpointer(base: Path, folder: Path) -> Any:
    kind = json.loads((base / "config.json").read_text())["model_type"]
    return FullModelHFCheckpointer(
        checkpoint_dir=str(base), checkpoint_files=["model.safetensors"], model_type=BUILDERS[kind][1], output_dir=str(folder),
    )  # fmt: skip


def _model(base: Path, loaded: dict[str, Any], told: dict[str, Any], rank: int, alpha: float) -> Any:
    """The recipe's `_setup_model`."""
    config = json.loads((base / "config.json").read_text())
    kind = config["model_type"]
    more: dict[str, Any] = {"head_dim": config["head_dim"]} if kind == "gemma" else {"apply_lora_to_output": told.get("output", False)}
    torch.manual_seed(0)
    model = BUILDERS[kind][0](
        lora_attn_modules=told["modules"], apply_lora_to_mlp=told.get("mlp", False), vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"], num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"], max_seq_len=64, intermediate_dim=config["intermediate_size"], norm_eps=config["rms_norm_eps"],
        rope_base=config["rope_theta"], lora_rank=rank, lora_alpha=alpha, use_dora=told.get("dora", False), **more,
    )  # fmt: skip
    set_trainable_params(model, get_adapter_params(model))
    missing, unexpected = model.load_state_dict(loaded[training.MODEL_KEY], strict=False)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    lora_missing, lora_unexpected = None, None
    if training.ADAPTER_KEY in loaded:
        lora_missing, lora_unexpected = model.load_state_dict(loaded[training.ADAPTER_KEY], strict=False)
    validate_missing_and_unexpected_for_lora(
        lora_attn_modules=told["modules"], apply_lora_to_mlp=told.get("mlp", False), apply_lora_to_output=told.get("output", False),
        base_missing=missing, base_unexpected=unexpected, lora_missing=lora_missing, lora_unexpected=lora_unexpected,
    )  # fmt: skip
    return model


def train(case: str, base: Path, adapter: Path) -> Tensor:
    """Two steps, saved as the recipe's `save_checkpoint` does; returns the logits of the model in memory."""
    told = CASES[case][1]
    work = Path(tempfile.mkdtemp())
    checkpointer = _checkpointer(base, work)
    model = _model(base, checkpointer.load_checkpoint(), told, RANK, ALPHA)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=STEP)
    for batch in steps():
        logits = model(batch)[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    modules = get_lora_module_names(told["modules"], told.get("mlp", False), told.get("output", False))
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "peft_type": "LORA"}
    saved = {training.ADAPTER_KEY: get_adapter_state_dict(model.state_dict()), training.ADAPTER_CONFIG: config}
    checkpointer.save_checkpoint(saved, epoch=0, adapter_only=True)
    shutil.copytree(work / "epoch_0", adapter)
    shutil.rmtree(work)
    return forward(model)


def forward(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(TOKENS)
    return found.double()


def loaded(base: Path, adapter: Path, told: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model with an adapter folder's `adapter_model.pt`, as the recipe resumes from it, and its config."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    with tempfile.TemporaryDirectory() as work:
        found = _checkpointer(base, Path(work)).load_checkpoint()
    found[training.ADAPTER_KEY] = safe_torch_load(adapter / "adapter_model.pt")  # as `load_checkpoint` of a run that is resumed
    return _model(base, found, told, config["r"], config["lora_alpha"]), config


def logits(base: Path, adapter: Path, told: dict[str, Any]) -> Tensor:
    """The logits of a base with an adapter, both loaded by torchtune."""
    return forward(loaded(base, adapter, told)[0])


def merged(base: Path, adapter: Path, told: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that torchtune itself merges, under its names."""
    model, config = loaded(base, adapter, told)
    found: dict[str, Tensor] = get_merged_lora_ckpt(model.state_dict(), rank=config["r"], alpha=config["lora_alpha"])
    return found
