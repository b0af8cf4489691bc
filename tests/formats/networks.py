"""Small networks that several formats have, adapters of all of their layers, and the way of one through a format and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas.base import Additive, Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.families import Family
from loratools.formats import encode
from loratools.formats._walks import DEFAULTS, ERAS, stable_diffusion, walk
from loratools.ops._layout import layout_for, stacked
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor, to_ref
from tests.formats.matrix import RANK, Draw
from tests.formats.places import options_of, row_of
from tests.strategies import randn


@dataclass(frozen=True)
class Network:
    """The matrices that are changed, what else its base has, its config, the formats; those without an alpha want a scaling of 1.

    `fused` are rows of each slot of a matrix that some format has apart, whose slots may have factors of their own; `shared` are matrices
    that are one in some format's model; `first` how many rows some format has, of a matrix that has more.
    """

    shapes: Mapping[str, tuple[int, ...]]
    formats: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    fused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    first: Mapping[str, int] = field(default_factory=dict)
    scaling: float | None = None
    only: tuple[str, ...] = ()

    @cached_property
    def base(self) -> Mapping[str, Spec]:
        return {name: Spec("F64", shape) for name, shape in self.shapes.items()} | {name: Spec("F64", (24, 24)) for name in self.beside}


# -- the networks: a Llama whose heads share keys and values, a Phi-3 with fused weights, Flux, Stable Diffusion's UNet

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": 8, "tie_word_embeddings": False}
_TEXT = ("peft", "loralib", "mlx", "torchtune", "litgpt", "nemo", "gguf", "scratch", "loratools")
_ATTENTION = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
_MLP = {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}


def _layers(attention: Mapping[str, tuple[int, ...]], mlp: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    roots = [f"model.layers.{layer}" for layer in range(2)]
    return {
        f"{root}.{part}.{name}.weight": shape
        for root in roots
        for part, names in (("self_attn", attention), ("mlp", mlp))
        for name, shape in names.items()
    }


def _unet() -> dict[str, tuple[int, ...]]:
    """The attentions, those of the text wider than high; sizes are small, for the names are what is told by."""
    names = walk(stable_diffusion("unet", 1), DEFAULTS["unet"][0], ERAS[0])
    return {f"unet.{name}": (8, 12) if ".attn2.to_k" in name or ".attn2.to_v" in name else (8, 8) for name in names}


_RESNETS = walk(stable_diffusion("unet", 1), ["ResnetBlock2D"], ERAS[0])
_UNET = tuple(
    f"unet.{name}"
    for name in (
        "conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight", "up_blocks.0.resnets.0.norm1.weight",
        *_RESNETS,
    )
)  # fmt: skip
_FLUX = {
    "double_blocks.0.img_attn.qkv.weight": (24, 8), "double_blocks.0.img_attn.proj.weight": (8, 8),
    "double_blocks.0.txt_attn.qkv.weight": (24, 8), "double_blocks.0.txt_attn.proj.weight": (8, 8),
    "single_blocks.0.linear2.weight": (8, 40),
}  # fmt: skip
_LLAMA = _layers(_ATTENTION, _MLP)
_PHI = _layers({"qkv_proj": (16, 8), "o_proj": (8, 8)}, {"gate_up_proj": (24, 8), "down_proj": (8, 12)})
NETWORKS: Mapping[str, Network] = {
    "Llama": Network(
        _LLAMA, _TEXT, {"model_type": "llama", **_HEADS},
        shared=tuple(
            tuple(f"model.layers.{layer}.{part}.{name}_proj.weight" for name in names)
            for layer in range(2)
            for part, names in (("self_attn", "qkv"), ("mlp", ("gate", "up")))
        ),
    ),
    "Phi-3": Network(
        _PHI, _TEXT, {"model_type": "phi3", **_HEADS},
        fused={name: (8, 4, 4) if "qkv" in name else (12, 12) for name in _PHI if "qkv" in name or "gate_up" in name},
    ),
    "Flux": Network(
        _FLUX, ("kohya", "diffusers", "comfyui", "xlabs", "loratools"), beside=("vector_in.in_layer.weight",), scaling=1.0,
        fused={name: (8, 8, 8) for name in _FLUX if "qkv" in name},
    ),
    "Flux, a single block": Network(
        {"single_blocks.0.linear1.weight": (56, 8), "single_blocks.0.linear2.weight": (8, 40)},
        ("kohya", "diffusers", "comfyui", "xlabs", "loratools"), scaling=1.0,
        beside=("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
        fused={"single_blocks.0.linear1.weight": (8, 8, 8, 32)}, first={"single_blocks.0.linear1.weight": 24},
    ),
    "Stable Diffusion": Network(
        _unet(), ("kohya", "diffusers", "comfyui", "cloneofsimo", "loratools"), beside=_UNET, scaling=1.0,
        only=("LoRA",),  # of 128 layers, and the other kinds are Flux'
    ),
}  # fmt: skip


# -- their adapters


def _low(draw: Draw, shape: tuple[int, ...], A: Ref | None = None, *, rslora: bool = False) -> LowRank:
    A = A or draw(RANK, shape[1])
    return LowRank(A=A, B=draw(shape[0], RANK), alpha=draw.alpha(RANK, rslora=rslora), rslora=rslora, layer="linear")


def _apart(draw: Draw, shape: tuple[int, ...], rows: tuple[int, ...]) -> LowRank:
    """A fused weight's slots, each with factors of its own, at the scaling of the others."""
    rank, B, start = RANK * len(rows), torch.zeros(shape[0], RANK * len(rows), dtype=draw.dtype), 0
    for slot, count in enumerate(rows):
        B[start : start + count, RANK * slot : RANK * (slot + 1)] = read_tensor(draw(count, RANK))
        start += count
    return LowRank(A=draw(rank, shape[1]), B=to_ref(B), alpha=draw.alpha(RANK) * len(rows), layer="linear")


def plain(network: Network, draw: Draw) -> dict[str, Delta]:
    return {name: _low(draw, shape) for name, shape in network.shapes.items()}


def stabilised(network: Network, draw: Draw) -> dict[str, Delta]:
    return {name: _low(draw, shape, rslora=True) for name, shape in network.shapes.items()}


def decomposed(network: Network, draw: Draw) -> dict[str, Delta]:
    sizes = {name: shape[0] for name, shape in network.shapes.items()}
    lows = {name: _low(draw, shape) for name, shape in network.shapes.items()}
    return {name: DoRA(direction=low, magnitude=draw(sizes[name], 1, scale=0.1, about=2.0)) for name, low in lows.items()}


def sharing(network: Network, draw: Draw) -> dict[str, Delta]:
    """Of q, k and v, and of gate and up, one A: what a trainer of the fused weight has."""
    common: dict[str, Ref] = {}
    for group in network.shared:
        common |= dict.fromkeys(group, draw(RANK, network.shapes[group[0]][1]))
    return {name: _low(draw, shape, common.get(name)) for name, shape in network.shapes.items()}


def apart(network: Network, draw: Draw) -> dict[str, Delta]:
    """Of a fused weight's slots, factors of their own: what a trainer of the slots has."""
    rows = network.fused
    return {name: _apart(draw, shape, rows[name]) if name in rows else _low(draw, shape) for name, shape in network.shapes.items()}


def some(network: Network, draw: Draw) -> dict[str, Delta]:
    """Of a matrix that has more, a change of its first rows alone."""
    lows = plain(network, draw)
    for name, rows in network.first.items():
        low = lows[name]
        assert isinstance(low, LowRank)
        B = read_tensor(low.B).clone()
        B[rows:] = 0
        lows[name] = replace(low, B=to_ref(B))
    return lows


Make = Callable[[Network, Draw], dict[str, Delta]]
KINDS: Mapping[str, Make] = {
    "LoRA": plain, "rsLoRA": stabilised, "DoRA": decomposed, "LoRA of one A": sharing, "LoRA of each slot": apart,
    "LoRA of first rows": some,
}  # fmt: skip


def kinds_of(network: Network) -> list[str]:
    """Those that are others than LoRA of it."""
    wants = {"LoRA of one A": network.shared, "LoRA of each slot": network.fused, "LoRA of first rows": network.first}
    return [kind for kind in KINDS if wants.get(kind, True) and kind in (network.only or KINDS)]


# -- through a format


def through(adapter: Adapter, format: str, network: Network) -> Adapter:
    """An adapter under the base's names, as `convert` lays it, written in a format, read, and under the base's names again."""
    relayout, _ = layout_for(adapter, format, None, network.base)
    written = encode(adapter if relayout is None else adapter.relaid(relayout), format)
    found = row_of(format).decode(written, options_of(format))
    return stacked(found.resolve(network.base, Family(dict(network.config))), network.base)


def made(delta: Delta, spec: Spec) -> tuple[Tensor, Tensor]:
    """In float64: what it makes of a weight, and what its rounding is measured by: |B||A|, else the weight made."""
    product = delta.product() if isinstance(delta, Additive) else None
    if product is not None:
        return product[0] @ product[1], product[0].abs() @ product[1].abs()
    rows, columns = delta.matrix(spec)
    part, W = slice(0, rows), randn(*spec.shape, seed=99).double()
    if isinstance(delta, Additive):
        ΔW = delta.bind_dense(spec)(part).clone()
        return ΔW, ΔW.abs()
    assert to_ref(W).spec == spec
    found = delta.bind(spec, lambda rows: iter([(part, W.reshape(-1, columns).clone())]))(part, W.reshape(-1, columns).clone())
    return found, found.abs()
