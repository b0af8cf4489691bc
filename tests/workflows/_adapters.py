"""Adapters for the tests of check and fit: one of each thing that some runtime has no place for.

`of` and MADE have a language model's names; `of_images` turns them into those of a diffusion pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.residual import Residual
from loratools.deltas.rotated import Rotated
from loratools.deltas.rows import Rows
from loratools.deltas.scaled import Scaled
from loratools.refs import Ref
from loratools.tensors import to_ref
from tests.files import peft_config, write_adapter, write_checkpoint
from tests.ops._bases import ROOT
from tests.strategies import randn

Q, V, UP = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
SHAPES = {Q: (8, 8), V: (4, 8), UP: (12, 8)}


def ref(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Ref:
    return to_ref(randn(*shape, seed=seed).to(dtype))


def low(name: str = Q, *, rank: int = 2, alpha: float = 4.0, rslora: bool = False, dtype: torch.dtype = torch.float32) -> LowRank:
    out, width = SHAPES[name]
    return LowRank(A=ref(rank, width, seed=1, dtype=dtype), B=ref(out, rank, seed=2, dtype=dtype), alpha=alpha, rslora=rslora)


def of(**more: Delta) -> Adapter:
    """LoRA on three layers, and more by the names that the keywords stand for."""
    return Adapter({name: low(name) for name in SHAPES} | {NAMES[word]: delta for word, delta in more.items()})


NAMES = {
    "q": Q, "v": V, "bias": Q.replace("weight", "bias"), "norm": "model.norm.weight", "head": "lm_head.weight", "score": "score.weight",
    "embedding": "model.embed_tokens.weight", "conv": "model.conv.weight",
}  # fmt: skip


def dora(axis: str = "out") -> DoRA:
    return DoRA(direction=low(), magnitude=ref(*((8, 1) if axis == "out" else (1, 8)), seed=3))


def leading() -> LowRank:
    """The two leading components of the base's weight, a little trained: what PiSSA leaves."""
    U, S, Vh = torch.linalg.svd(randn(8, 8, seed=11))
    B, A = U[:, :2] * S[:2].sqrt(), S[:2].sqrt()[:, None] * Vh[:2]
    A, B = A + 0.01 * randn(2, 8, seed=1), B + 0.01 * randn(8, 2, seed=2)
    return LowRank(A=to_ref(A.contiguous()), B=to_ref(B.contiguous()), alpha=2.0)


def loha() -> LoHa:
    refs = {"w1_a": ref(8, 2, seed=1), "w1_b": ref(2, 8, seed=2), "w2_a": ref(8, 2, seed=3), "w2_b": ref(2, 8, seed=4)}
    return LoHa(**refs, scale=0.5, alpha=1.0)


BLOCK = "unet.mid_block.attentions.0.transformer_blocks.0."
IMAGES = ("comfyui", "diffusers", "kohya")  # targets that run diffusion models
_AS_IMAGES = {
    Q: f"{BLOCK}attn1.to_out.0.weight", V: f"{BLOCK}attn1.to_v.weight", UP: f"{BLOCK}ff.net.0.proj.weight",
    NAMES["bias"]: f"{BLOCK}attn1.to_out.0.bias", NAMES["norm"]: f"{BLOCK}norm1.weight", NAMES["score"]: "unet.class_embedding.weight",
    NAMES["conv"]: "unet.mid_block.resnets.0.conv1.weight", NAMES["head"]: "unet.mid_block.attentions.0.proj_out.weight",
    NAMES["embedding"]: "text_encoder.text_model.embeddings.token_embedding.weight",
}  # fmt: skip


def of_images(adapter: Adapter) -> Adapter:
    """The adapter under names of a diffusion pipeline."""
    return replace(adapter, deltas={_AS_IMAGES[name]: delta for name, delta in adapter.items()})


def made_for(target: str, word: str) -> Adapter:
    """An adapter of MADE of a model that the target runs."""
    return of_images(MADE[word]()) if target in IMAGES else MADE[word]()


MADE: dict[str, Callable[[], Adapter]] = {
    "plain": of,
    "rslora": lambda: of().map(lambda name, delta: replace(low(name), rslora=True)),
    "patterns": lambda: of(q=low(rank=4, alpha=3.0), v=low(V, rank=1, alpha=16.0)),
    "bfloat16": lambda: of().map(lambda name, delta: low(name, alpha=3.0 if name == Q else 8.0, dtype=torch.bfloat16)),
    "dora": lambda: of(q=dora()),
    "dora on all": lambda: of().map(lambda name, delta: DoRA(direction=low(name), magnitude=ref(SHAPES[name][0], 1, seed=3))),
    "dora in": lambda: of(q=dora("in")),
    "loha": lambda: of(q=loha()),
    "lokr": lambda: of(q=LoKr(w1=ref(2, 2, seed=1), w2=ref(4, 4, seed=2), scale=1.0)),
    "pissa": lambda: of(q=Residual(init="pissa", then=leading())),
    "rotated": lambda: of(q=Rotated(numbers=ref(2, 4, 4), side="out")),
    "scaled": lambda: of(q=Scaled(l=ref(8), axis=0)),
    "full": lambda: of(q=Full(diff=ref(8, 8, seed=5))),
    "saved": lambda: of(score=Replacement(value=ref(3, 8, seed=6))),
    "rows": lambda: of(embedding=Rows(values=ref(2, 8, seed=7), indices=(1, 3))),
    "bias": lambda: of(bias=Full(diff=ref(8, seed=8))),
    "norm": lambda: of(norm=Full(diff=ref(8, seed=9))),
    "embedding": lambda: of(embedding=LowRank(A=ref(2, 8, seed=1), B=ref(16, 2, seed=2), alpha=2.0, layer="embedding")),
    "conv": lambda: of(conv=LowRank(A=ref(2, 4, 3, 3, seed=1), B=ref(6, 2, seed=2), alpha=2.0, layer="conv")),
    "head": lambda: of(head=LowRank(A=ref(2, 8, seed=1), B=ref(16, 2, seed=2), alpha=2.0)),
    "high rank": lambda: of(q=LowRank(A=ref(520, 8, seed=1), B=ref(8, 520, seed=2), alpha=520.0)),
    "passengers": lambda: replace(of(), passengers={"<s1>": ref(1, 8)}),
}  # fmt: skip


CONFIG = {
    "model_type": "llama", "tie_word_embeddings": True, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 1, "intermediate_size": 12, "vocab_size": 16, "head_dim": 4,
}  # fmt: skip


def folder(path: Path, **config: object) -> Path:
    """LoRA in a peft folder whose config says more."""
    tensors = {}
    for name, (out, width) in SHAPES.items():
        tensors[f"{ROOT}{name.removesuffix('weight')}lora_A.weight"] = randn(2, width, seed=1)
        tensors[f"{ROOT}{name.removesuffix('weight')}lora_B.weight"] = randn(out, 2, seed=2)
    return write_adapter(path, tensors, peft_config(target_modules=["q_proj", "v_proj", "up_proj"]) | config)


def base(path: Path, *, images: bool = False) -> Path:
    """A checkpoint with every tensor that the adapters change; its head is tied. With `images`, a diffusion pipeline's."""
    tensors = {name: randn(*shape, seed=11) for name, shape in SHAPES.items()}
    tensors |= {"model.embed_tokens.weight": randn(16, 8, seed=12), "model.norm.weight": randn(8, seed=13)}
    tensors |= {"score.weight": randn(3, 8, seed=14), "model.conv.weight": randn(6, 4, 3, 3, seed=15), NAMES["bias"]: randn(8, seed=16)}
    if images:
        tensors[NAMES["head"]] = randn(16, 8, seed=17)
        return write_checkpoint(path, {_AS_IMAGES[name]: tensor for name, tensor in tensors.items()}, None)
    return write_checkpoint(path, tensors, CONFIG)
