"""Writing and reading the files that tests work on, by the safetensors library rather than by loratools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]


def write_checkpoint(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = None, *, shards: int = 1) -> Path:
    """A base model's folder as transformers writes it: one file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(kept)
    files = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    where = {name: files[index * shards // len(names)] for index, name in enumerate(names)}
    for file in files:
        save_file({name: kept[name] for name in names if where[name] == file}, folder / file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n"
    )
    return folder


def write_pickled(
    folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = None, *, shards: int = 1, stem: str = "pytorch_model"
) -> Path:
    """A base model's folder as transformers wrote it before safetensors; tensors that share storage are saved sharing it."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        torch.save(dict(tensors), folder / f"{stem}.bin")
        return folder
    names = list(tensors)
    where = {name: f"{stem}-{index * shards // len(names) + 1:05}-of-{shards:05}.bin" for index, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: tensors[name] for name in names if where[name] == file}, folder / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / f"{stem}.bin.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n")
    return folder


def write_pipeline(folder: Path, models: Mapping[str, tuple[Tensors, Mapping[str, Any]]], **listed: Any) -> Path:
    """A diffusers pipeline: models of (tensors, config), a scheduler and a tokenizer; `listed` are more lines of its index."""
    index = {"_class_name": "TestPipeline", "_diffusers_version": "0.42.0", "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "safety_checker": [None, None], "force_zeros": True, **listed}
    for name, (tensors, config) in models.items():
        write_checkpoint(folder / name, tensors, config)
        index[name] = ["transformers" if name.startswith("text_encoder") else "diffusers", config.get("_class_name", "AnyModel")]
        if not name.startswith("text_encoder"):
            (folder / name / "model.safetensors").rename(folder / name / "diffusion_pytorch_model.safetensors")
    for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_adapter(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None) -> Path:
    """A peft adapter's folder: keys as given, the config as given."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_config(**more: Any) -> dict[str, Any]:
    """The least an adapter_config.json says: rank 2, alpha 4, targets to be added."""
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "target_modules": None} | more


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and its config."""
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint: a folder's, or one file's."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes: comparing them tells -0 from 0 and one nan from another."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def llama_config(**more: object) -> dict[str, object]:
    """The part of a Llama's config.json that says what its tensors are."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return config | more


def llama_tensors(
    dtype: torch.dtype = torch.float32, *, vocabulary: int = 17, hidden: int = 8, head: bool = True
) -> dict[str, torch.Tensor]:
    """The tensors of a tiny Llama, random from a fixed seed."""
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        root = f"model.layers.{layer}"
        shapes |= {f"{root}.self_attn.{name}_proj.weight": (hidden // 2 if name in "kv" else hidden, hidden) for name in "qkvo"}
        shapes |= {f"{root}.mlp.up_proj.weight": (2 * hidden, hidden), f"{root}.mlp.down_proj.weight": (hidden, 2 * hidden)}
        shapes |= {f"{root}.input_layernorm.weight": (hidden,)}
    if head:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
