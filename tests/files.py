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


def four_bit(
    name: str, W: Tensor, *, nested: bool = True, size: int = 64, kind: str = "nf4", dtype: str = "bfloat16", above: int = 256
) -> dict[str, Tensor]:
    """A weight as bitsandbytes stores it in 4 bits, by its rules: nearest values, absmax of blocks, absmax itself in 8 bits."""
    table = torch.tensor(CODEBOOKS[kind])
    flat = torch.nn.functional.pad(W.detach().float().reshape(-1), (0, -W.numel() % size)).view(-1, size)
    absmax = flat.abs().amax(1)
    codes = (flat / absmax.clamp_min(1e-30)[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1).view(-1)[: W.numel()]
    codes = torch.nn.functional.pad(codes, (0, W.numel() % 2)).to(torch.uint8).view(-1, 2)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": dtype, "shape": list(W.shape)}
    tensors = {name: (codes[:, 0] << 4 | codes[:, 1]).view(-1, 1), f"{name}.quant_map": table}
    if nested:
        offset = float(absmax.mean())
        map8 = torch.linspace(-1, 1, 256)
        rest = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % above)).view(-1, above)
        largest = rest.abs().amax(1).clamp_min(1e-30)
        code8 = (rest / largest[:, None]).unsqueeze(-1).sub(map8).abs().argmin(-1).view(-1)[: len(absmax)]
        tensors |= {f"{name}.absmax": code8.to(torch.uint8), f"{name}.nested_absmax": largest, f"{name}.nested_quant_map": map8}
        state |= {"nested_blocksize": above, "nested_dtype": "float32", "nested_offset": offset}
    else:
        tensors[f"{name}.absmax"] = absmax
    packed = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()
    return tensors | {f"{name}.quant_state.bitsandbytes__{kind}": packed}


# QLoRA, appendix E, and bitsandbytes' fp4, as float32 has them
CODEBOOKS = {
    "nf4": [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    "fp4": [
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ],
}  # fmt: skip


def fp8_blocks(W: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """A matrix in fp8 and its scales, one a block, those at the edges cut off (DeepSeek-V3's inference code)."""
    (rows, columns), (height, width) = W.shape, block
    scales = torch.empty(-(-rows // height), -(-columns // width))
    codes = torch.empty(W.shape, dtype=torch.float8_e4m3fn)
    for i, j in ((i, j) for i in range(len(scales)) for j in range(scales.shape[1])):
        place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
        scales[i, j] = W[place].abs().max() / 448
        codes[place] = (W[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


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


def lora(module: str, A: Tensor, B: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """A module's LoRA as peft's file has it; `__` in a further key stands for a dot."""
    keys = {f"base_model.model.{module}.{name.replace('__', '.')}": tensor for name, tensor in more.items()}
    return {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B} | keys


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


def halves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Llama's tensors whose head is the embedding, as a state dict of transformers has it."""
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
