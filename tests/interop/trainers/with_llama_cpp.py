"""llama.cpp, by llama-cpp-python: a base written as its converter writes it, an adapter loaded by its own loader, its forward.

The tensors' names are the gguf package's; rows of q and k are permuted, experts stacked and matrices of GPT-2 turned as in llama.cpp's
`conversion/llama.py`, `conversion/qwen.py` and `conversion/gpt2.py`, said again here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.interop.trained import TOKENS, peft_adapter

ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "phi3": "phi3"}
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # the base, and what peft's LoRA is put on
    "llama-lora": ("llama", {"targets": [*DENSE, "lm_head"]}),
    "llama-rslora": ("llama", {"targets": DENSE[:4], "use_rslora": True}),
    "qwen2-lora": ("qwen2", {"targets": DENSE}),
    "qwen3-lora": ("qwen3", {"targets": DENSE}),
    "phi3-lora": ("phi3", {"targets": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "mixtral-lora": ("mixtral", {"targets": DENSE[:4]}),
}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def train(case: str, base: Path, adapter: Path) -> Tensor:
    """A peft adapter as llama.cpp's `convert_lora_to_gguf.py` writes it, of the repository that LLAMA_CPP names; llama.cpp's logits."""
    script = Path(os.environ["LLAMA_CPP"]) / "convert_lora_to_gguf.py"
    adapter.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        peft_adapter(base, Path(work), **CASES[case][1])
        command = [sys.executable, str(script), work, "--base", str(base), "--outfile", str(adapter / "adapter.gguf"), "--outtype", "f32"]
        subprocess.run(command, check=True, capture_output=True)
    return logits(base, adapter / "adapter.gguf")


def permuted(weight: Tensor, heads: int) -> Tensor:
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_base(base: Path, file: Path) -> None:
    """The base as a GGUF model in float32, without a vocabulary."""
    told = json.loads((base / "config.json").read_text())
    kind = told["model_type"]
    names = gguf.get_tensor_name_map(_architecture(kind), told.get("num_hidden_layers", told.get("n_layer")))
    writer = gguf.GGUFWriter(file, ARCHITECTURES[kind])
    _fields(writer, told)
    stacks: dict[str, dict[int, Tensor]] = {}
    for key, tensor in load_file(base / "model.safetensors").items():
        module, _, end = key.rpartition(".")
        parts = module.split(".")
        if "experts" in parts:
            stacks.setdefault(f"blk.{parts[2]}.{EXPERTS[parts[-1]]}.weight", {})[int(parts[-2])] = tensor
            continue
        if ARCHITECTURES[kind] == "llama" and parts[-1] in ("q_proj", "k_proj"):
            tensor = permuted(tensor, told["num_attention_heads"] if parts[-1] == "q_proj" else told["num_key_value_heads"])
        if kind == "gpt2" and parts[-1] in ("c_attn", "c_proj", "c_fc") and end == "weight":
            tensor = tensor.T
        name = names.get_name(f"transformer.{module}" if kind == "gpt2" else module)
        assert name is not None, key
        writer.add_tensor(f"{name}.{end}", tensor.contiguous().float().numpy())
        if kind == "gpt2" and name == "token_embd":
            writer.add_tensor("output.weight", tensor.contiguous().float().numpy())
    for name, members in stacks.items():
        writer.add_tensor(name, torch.stack([members[number] for number in range(len(members))]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(kind: str) -> Any:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind])


def _fields(writer: Any, told: dict[str, Any]) -> None:
    heads = told.get("num_attention_heads", told.get("n_head"))
    width = told.get("hidden_size", told.get("n_embd"))
    writer.add_context_length(told.get("n_positions", 256))
    writer.add_embedding_length(width)
    writer.add_block_count(told.get("num_hidden_layers", told.get("n_layer")))
    writer.add_feed_forward_length(told.get("intermediate_size", 4 * width))
    writer.add_head_count(heads)
    writer.add_head_count_kv(told.get("num_key_value_heads", heads))
    writer.add_vocab_size(told["vocab_size"])
    writer.add_tokenizer_model("none")
    if "rms_norm_eps" in told:
        size = told.get("head_dim") or width // heads
        writer.add_layer_norm_rms_eps(told["rms_norm_eps"])
        writer.add_rope_freq_base(told["rope_theta"])
        writer.add_rope_dimension_count(size)
        writer.add_key_length(size)
        writer.add_value_length(size)
    else:
        writer.add_layer_norm_eps(told["layer_norm_epsilon"])
    if "num_local_experts" in told:
        writer.add_expert_count(told["num_local_experts"])
        writer.add_expert_used_count(told["num_experts_per_tok"])


def logits(base: Path, adapter: Path | None = None, scale: float = 1.0) -> Tensor:
    """The logits of a base with a GGUF adapter, both loaded by llama.cpp."""
    with tempfile.TemporaryDirectory() as work:
        write_base(base, Path(work) / "base.gguf")
        model = llama_cpp.Llama(
            str(Path(work) / "base.gguf"), lora_path=None if adapter is None else str(adapter), lora_scale=scale, n_ctx=64, n_threads=1,
            logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0,
        )  # fmt: skip
        rows = []
        for row in TOKENS.tolist():
            model.reset()
            model.eval(row)
            rows.append(np.array(model.scores[: len(row)]))
        model.close()
        return torch.from_numpy(np.stack(rows)).double()
