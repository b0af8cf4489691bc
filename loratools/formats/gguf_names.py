"""How llama.cpp names a model's tensors, and which of them its converter lays otherwise than they were: one row an architecture.

The names are those of the gguf package's tensor map; here is what it does not tell, read from llama.cpp's `conversion/*.py` (2026): which
`model_type` becomes which architecture, which modules of it are matrices that LoRA is looked up for, where rows of q and k are
interleaved (`LlamaModel.permute`), which weights are turned, where experts are stacked, whose head is tied unless the config says not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from loratools.errors import FormatError, UnsupportedError
from loratools.formats._heads import text_config
from loratools.gguffile import package

_QKVO = tuple(f"self_attn.{side}_proj" for side in "qkvo")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA = (*_QKVO, *_GATED)
_QWEN_EXPERTS = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.down_proj", "mlp.experts.{}.up_proj")
HEADS, SHARED = "{}.attention.head_count", "{}.attention.head_count_kv"
_STACKS = ("ffn_gate_exps", "ffn_down_exps", "ffn_up_exps")


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures: the `model_type`s that become it, and the modules of a block.

    `rotary`: rows of q_proj and k_proj are interleaved; `turned`: matrices are stored (in, out) and turned; `tied`: the model types
    whose head is the embedding where the config does not say; `experts`: the gate, down and up matrix of one of them.
    """

    name: str
    types: tuple[str, ...]
    modules: tuple[str, ...] = _LLAMA
    rotary: bool = False
    turned: bool = False
    tied: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    block: str = "model.layers."
    embedding: str = "model.embed_tokens"


ARCHITECTURES = (
    Architecture(
        "llama", ("llama", "mistral", "mixtral"), (*_LLAMA, "block_sparse_moe.gate"), rotary=True,
        experts=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w2", "block_sparse_moe.experts.{}.w3"),
    ),
    Architecture("smollm3", ("smollm3",), rotary=True, tied=("smollm3",)),
    Architecture("arcee", ("arcee",), (*_QKVO, "mlp.up_proj", "mlp.down_proj"), rotary=True),
    Architecture("granite", ("granite",), rotary=True),
    Architecture("olmo", ("olmo",), rotary=True),
    Architecture("olmo2", ("olmo2", "olmo3")),
    Architecture("olmoe", ("olmoe",), (*_QKVO, "mlp.gate"), experts=_QWEN_EXPERTS),
    Architecture("qwen2", ("qwen2",)),
    Architecture("qwen3", ("qwen3",)),
    Architecture(
        "qwen2moe", ("qwen2_moe",), (*_QKVO, "mlp.gate", *(f"mlp.shared_expert.{side}_proj" for side in ("gate", "up", "down"))),
        experts=_QWEN_EXPERTS,
    ),
    Architecture("qwen3moe", ("qwen3_moe",), (*_QKVO, "mlp.gate"), experts=_QWEN_EXPERTS),
    Architecture("seed_oss", ("seed_oss",)),
    Architecture("gemma", ("gemma",), tied=("gemma",)),
    Architecture("gemma2", ("gemma2",), tied=("gemma2",)),
    Architecture("gemma3", ("gemma3_text", "gemma3"), tied=("gemma3_text", "gemma3")),
    Architecture("command-r", ("cohere",), tied=("cohere",)),
    Architecture("cohere2", ("cohere2",), tied=("cohere2",)),
    Architecture("phi2", ("phi",), ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    Architecture("phi3", ("phi3",), ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    Architecture("starcoder2", ("starcoder2",), (*_QKVO, "mlp.c_fc", "mlp.c_proj"), tied=("starcoder2",)),
    Architecture(
        "gpt2", ("gpt2",), ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), turned=True, tied=("gpt2",), block="transformer.h.",
        embedding="transformer.wte",
    ),
)  # fmt: skip


def architecture(name: str) -> Architecture:
    """The row of GGUF's name for it. Raises UnsupportedError for architectures whose converter has not been read."""
    found = next((row for row in ARCHITECTURES if row.name == name), None)
    if found is None:
        known = " ".join(row.name for row in ARCHITECTURES)
        raise UnsupportedError("an architecture whose names in GGUF are not known here", found=name, expected=f"one of {known}")
    return found


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row of a base's config. Raises UnsupportedError for a `model_type` that is not in the table."""
    kind = text_config(config).get("model_type")
    found = next((row for row in ARCHITECTURES if kind in row.types), None)
    if found is None:
        known = " ".join(name for row in ARCHITECTURES for name in row.types)
        raise UnsupportedError("a model_type whose names in GGUF are not known here", found=kind, expected=f"one of {known}")
    return found


def tied_head(config: Mapping[str, Any]) -> bool:
    """Whether the model's head is its input embedding."""
    text = text_config(config)
    stated = next((part["tie_word_embeddings"] for part in (config, text) if part.get("tie_word_embeddings") is not None), None)
    return bool(stated) if stated is not None else text.get("model_type") in architecture_of(config).tied


@dataclass(frozen=True)
class Heads:
    """How many heads q and k have."""

    q: int
    k: int

    def of(self, side: str) -> int:
        return self.q if side == "q" else self.k


def heads_of(config: Mapping[str, Any]) -> Heads | None:
    """The heads that a base's config tells, None where it does not."""
    text = text_config(config)
    count = text.get("num_attention_heads")
    shared = text.get("num_key_value_heads")
    return _heads(count, count if shared is None else shared)


def stated_heads(fields: Mapping[str, Any], name: str) -> Heads | None:
    """The heads that the fields of a GGUF file of an architecture tell, None where they do not."""
    count = fields.get(HEADS.format(name))
    return _heads(count, fields.get(SHARED.format(name), count))


def _heads(q: Any, k: Any) -> Heads | None:
    return Heads(q, k) if type(q) is type(k) is int and q > 0 and k > 0 else None


@dataclass(frozen=True)
class Place:
    """What a GGUF tensor is in the model: its weight's name, `{}` for the expert where it is a stack's; `side` q or k if interleaved."""

    name: str
    stacked: bool = False
    side: str | None = None


class Names:
    """The names of one architecture, both ways. Raises UnsupportedError where the installed gguf package does not know it."""

    def __init__(self, row: Architecture) -> None:
        self.row = row
        self.leaves, self._top = _table(row)
        self.experts = dict(zip(_STACKS, row.experts, strict=False))

    def place(self, base: str) -> Place:
        """What a tensor of llama.cpp's model is, from its name with its ending. Raises FormatError for those LoRA is not looked up for."""
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", base)
        for module, name in self._top.items():
            if base == f"{name}.weight":
                return Place(f"{module}.weight")
        if found and found[2] in self.experts:
            return Place(f"{self.row.block}{found[1]}.{self.experts[found[2]]}.weight", stacked=True)
        leaf = next((leaf for leaf, name in self.leaves.items() if found and name == found[2]), None)
        if found is None or leaf is None:
            known = ", ".join(self.leaves.values())
            raise FormatError(f"not a tensor of {self.row.name} that llama.cpp looks up a LoRA for", expected=known)
        return Place(f"{self.row.block}{found[1]}.{leaf}.weight", side=self._side(leaf))

    def _side(self, leaf: str) -> str | None:
        return leaf[-6] if self.row.rotary and leaf in ("self_attn.q_proj", "self_attn.k_proj") else None

    def gguf(self, name: str) -> tuple[str, int | None, str | None] | None:
        """(llama.cpp's name, the expert, q or k) of a weight's name as a checkpoint or transformers spells it, or None."""
        module = _canonical(name, self.row)
        if module in self._top:
            return f"{self._top[module]}.weight", None, None
        found = re.fullmatch(re.escape(self.row.block) + r"(\d+)\.(.+)", module)
        if not found or not name.endswith(".weight"):
            return None
        if found[2] in self.leaves:
            return f"blk.{found[1]}.{self.leaves[found[2]]}.weight", None, self._side(found[2])
        for stack, template in (*self.experts.items(), *(zip(_STACKS, _QWEN_EXPERTS, strict=True) if self.experts else ())):
            expert = re.fullmatch(re.escape(template).replace(r"\{\}", r"(\d+)"), found[2])
            if expert:
                return f"blk.{found[1]}.{stack}.weight", int(expert[1]), None
        return None


def _canonical(name: str, row: Architecture) -> str:
    """A module's name as the architecture's class for causal language models has it, without what stands before or lacks in others."""
    module = name.removesuffix(".weight")
    for prefix, instead in (("model.language_model.", "model."), ("language_model.", "")):
        if module.startswith(prefix):
            module = instead + module.removeprefix(prefix)
            break
    root = row.block.partition(".")[0]
    own = (row.block.removeprefix(f"{root}."), row.embedding.removeprefix(f"{root}."))
    return f"{root}.{module}" if module.startswith(own) else module


@cache
def _table(row: Architecture) -> tuple[dict[str, str], dict[str, str]]:
    """llama.cpp's names of a block's modules, by what follows the block's number, and of those outside of blocks."""
    gguf = package()
    kind = next((kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name), None)
    table: Mapping[str, tuple[Any, str]] = gguf.get_tensor_name_map(kind, 1).mapping if kind is not None else {}
    keys = {leaf: f"{row.block}0.{leaf}" for leaf in row.modules}
    lacking = [leaf for leaf, key in keys.items() if key not in table]
    if lacking:
        fact = f"the installed gguf package does not know all of {row.name}"
        raise UnsupportedError(fact, found=f"no {', '.join(lacking)}", remedy='pip install -U "loratools[gguf]"')
    leaves = {leaf: table[key][1].removeprefix("blk.0.") for leaf, key in keys.items()}
    return leaves, {module: table[module][1] for module in (row.embedding, "lm_head") if module in table}
