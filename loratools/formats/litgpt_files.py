"""What litgpt's `model_config.yaml` and `hyperparameters.yaml` tell of a model and of its LoRA, and the latter as it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapter import Adapter
from loratools.errors import FormatError, NotExpressible
from loratools.formats._heads import Heads
from loratools.formats._trainer import Module
from loratools.layouts.trainers import template_of

FILE = "lit_model.pth.lora"
_OWN = "loratools_"  # keys of hyperparameters.yaml that litgpt passes over
_HEADS = ("n_head", "n_query_groups", "head_size")
# what a config's name begins with, in the order of litgpt's convert_lit_checkpoint.py, and the model_type of such models
_NAMES = (
    ("falcon", "falcon"), ("gemma-3", "gemma3_text"), ("gemma-2", "gemma2"), ("gemma", "gemma"), ("codegemma", "gemma"), ("phi-3", "phi3"),
    ("phi-4", "phi3"), ("phi", "phi"), ("qwen2.5", "qwen2"), ("qwq", "qwen2"), ("qwen3", "qwen3"), ("olmo-2", "olmo2"),
    ("mixtral", "mixtral"), ("mistral", "mistral"), ("llama", "llama"), ("codellama", "llama"), ("tiny-llama", "llama"),
    ("pythia", "gpt_neox"),
)  # fmt: skip
_FLAGS = (
    ("lora_projection", r"\.attn\.proj$"), ("lora_mlp", r"\.mlp\."), ("lora_head", r"^lm_head$"),
)  # fmt: skip


def model_config(config: Mapping[str, Any], hyper: Mapping[str, Any]) -> tuple[str | None, Heads | None]:
    """(model_type, heads) of a model_config.yaml, or of what loratools wrote into hyperparameters.yaml; None for what they lack."""
    own = {key: hyper.get(_OWN + key) for key in ("model_type", *_HEADS)}
    if not config:
        kind = own["model_type"]
        return (kind if isinstance(kind, str) else None), _heads(*(own[key] for key in _HEADS))
    name = str(config.get("name", "")).lower()
    kind = next((kind for start, kind in _NAMES if name.startswith(start)), None)
    query = config.get("n_head")
    groups, size = config.get("n_query_groups"), config.get("head_size")
    if size is None and type(query) is int and type(config.get("n_embd")) is int and query:
        size = config["n_embd"] // query
    return kind, _heads(query, query if groups is None else groups, size)


def _heads(query: object, groups: object, size: object) -> Heads | None:
    if query is None:
        return None
    if type(query) is not int or type(groups) is not int or type(size) is not int:
        raise FormatError("the heads of litgpt's config", found=f"{query}, {groups} of {size} rows", expected="whole numbers")
    return Heads(query, groups, size)


def hyperparameters(adapter: Adapter, rank: int, alpha: float, modules: Sequence[Module], heads: Heads | None) -> dict[str, Any]:
    """hyperparameters.yaml of what is written. Raises NotExpressible where blocks have LoRA on different modules."""
    kinds: dict[str, list[Module]] = {}
    for module in modules:
        kinds.setdefault(template_of(module.name), []).append(module)
    _check_even(adapter, kinds)
    fused = next((tuple(found[0].pieces) for kind, found in kinds.items() if kind.endswith(".attn.qkv")), ())
    source = adapter.metadata.get("peft", {}).get("base_model_name_or_path")
    told: dict[str, Any] = {
        "checkpoint_dir": f"checkpoints/{source}" if source else "checkpoints",
        "lora_r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": 0.0,
    }  # fmt: skip
    told |= {f"lora_{name}": slot in fused for slot, name in enumerate(("query", "key", "value"))}
    told |= {flag: any(re.search(pattern, kind) for kind in kinds) for flag, pattern in _FLAGS}
    model_type = adapter.model.get("model_type")
    if isinstance(model_type, str):
        told[_OWN + "model_type"] = model_type
    if heads is not None:
        told |= {_OWN + key: value for key, value in zip(_HEADS, (heads.query, heads.groups, heads.size), strict=True)}
    return told


def _check_even(adapter: Adapter, kinds: Mapping[str, list[Module]]) -> None:
    """Raise NotExpressible where some block has LoRA on a module, or a slot of q, k and v, and another has not."""
    blocks = {kind: found for kind, found in kinds.items() if kind.startswith("transformer.") and ".experts." not in kind}
    most = max((len(found) for found in blocks.values()), default=0)
    every = {kind: set.union(*(set(module.pieces) for module in found)) for kind, found in blocks.items()}
    lone = next((found[0] for found in blocks.values() if len(found) < most), None)
    lone = lone or next((module for kind, found in blocks.items() for module in found if set(module.pieces) != every[kind]), None)
    if lone is not None:
        found = ", ".join(f"{len(found)} {kind.removeprefix('transformer.h.{}.')}" for kind, found in blocks.items())
        fact, remedy = "litgpt has LoRA on the same modules of every block", "--format peft has it on any"
        tensor = next(iter(lone.tensors.values()))
        raise NotExpressible(fact, file=adapter.path, tensor=tensor, found=found, remedy=remedy)
