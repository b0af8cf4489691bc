"""Where each format's modules lie: the names that its models have for a layer, what a reader is told, and what a file must have beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.families import Family
from loratools.formats import FORMATS, Format
from loratools.formats._walks import DEFAULTS, ERAS, stable_diffusion, walk
from loratools.formats.base import Container, ReadOptions
from loratools.refs import Spec
from tests.formats.matrix import KINDS, LAYERS, Draw, low

TOLD = ReadOptions(embeddings=("*embed_tokens*",), transposed=("*c_attn*",), scratch_dora="merged")
Rest = Mapping[str, tuple[str, str]]  # by name: (kind, layer)


@dataclass(frozen=True)
class Place:
    """How a format's models call their modules, whether flat, and what a reader has to be told.

    `names` are those that are not the layer's own below `root`, one of each that is changed at once; `models` the config.json of a model
    that has such a layer; `rest` what a file must change too. Files without an alpha have a `scaling`; of `counted` modules the base tells
    the names.
    """

    root: str = "model.layers.0."
    flat: bool = False
    options: ReadOptions = TOLD
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rest: Callable[[str], Rest] = lambda layer: {}
    scaling: float | None = None
    counted: bool = False

    def named(self, layer: str) -> tuple[str, ...]:
        module, leaf, _, _ = LAYERS[layer]
        both = ("experts.0.w1.weight", "experts.1.w1.weight") if layer == "experts, one by one" else (f"{module}.{leaf}",)
        return self.names.get(layer, tuple(self.root + name for name in both))

    def model(self, layer: str) -> Mapping[str, Any]:
        return self.models.get(layer, self.models.get("", {}))


# -- language models, under the names of transformers

_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 2, "tie_word_embeddings": False}
_MIXTRAL = {"model_type": "mixtral", "num_local_experts": 2, **_HEADS}
LANGUAGE = Place(
    names={
        "linear": ("model.layers.0.self_attn.q_proj.weight",),
        "embedding": ("model.embed_tokens.weight",),
        "Conv1D, stored (in, out)": ("transformer.h.0.attn.c_attn.weight",),
        "norm": ("model.layers.0.input_layernorm.weight",),
        "bias": ("model.layers.0.self_attn.q_proj.bias",),
        "stack of experts": ("model.layers.0.mlp.experts.gate_up_proj",),
        "experts, one by one": tuple(f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(2)),
        "output head": ("lm_head.weight",),
        "fused q, k and v": ("model.layers.0.self_attn.qkv_proj.weight",),
    },
    models={
        "": {"model_type": "llama", **_HEADS},
        "Conv1D, stored (in, out)": {"model_type": "gpt2", "n_head": 3, "tie_word_embeddings": False},
        "stack of experts": _MIXTRAL,
        "experts, one by one": _MIXTRAL,
        "fused q, k and v": {"model_type": "phi3", **_HEADS, "num_attention_heads": 2, "num_key_value_heads": 2},
    },
)  # fmt: skip


# -- diffusion networks, and a vision transformer


def _unet(layer: str) -> Rest:
    """All that a file of cloneofsimo's counts: the attentions of Stable Diffusion's UNet, and for a convolution its other layers too."""
    targets = DEFAULTS["unet"][2 if layer.startswith("convolution") else 0]
    return {f"unet.{name}": ("LoRA", _lies(name)) for name in walk(stable_diffusion("unet", 1), targets, ERAS[0])}


def _lies(name: str) -> str:
    """What layer of the matrix stands for one of the UNet's; its GEGLU has another shape, by which its order is told."""
    words = {".conv_shortcut.": "convolution 1×1", ".conv1.": "convolution 3×3", ".conv2.": "convolution 3×3", ".ff.": "output head"}
    return next((layer for word, layer in words.items() if word in name), "linear")


UNET = Place(
    "unet.mid_block.attentions.0.", scaling=1.0, counted=True, rest=_unet,
    names={
        "linear": ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",),
        "convolution 1×1": ("unet.down_blocks.1.resnets.0.conv_shortcut.weight",),
        "convolution 3×3": ("unet.mid_block.resnets.0.conv1.weight",),
        "embedding": ("text_encoder.text_model.embeddings.token_embedding.weight",),
        "bias": ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.bias",),
    },
)  # fmt: skip
SAM = Place(
    "image_encoder.blocks.0.", scaling=1.0, counted=True,
    rest=lambda layer: {"image_encoder.blocks.0.attn.qkv.weight": ("LoRA of q and of v", "fused q, k and v")},
    names={
        "linear": ("image_encoder.blocks.0.attn.proj.weight",), "norm": ("image_encoder.blocks.0.norm1.weight",),
        "bias": ("image_encoder.blocks.0.attn.proj.bias",), "output head": ("head.weight",),
        "fused q, k and v": ("image_encoder.blocks.0.attn.qkv.weight",),
    },
)  # fmt: skip
FLUX = Place(
    "double_blocks.0.", scaling=1.0,
    names={
        "linear": ("double_blocks.0.img_attn.proj.weight",), "norm": ("double_blocks.0.img_attn.norm.query_norm.scale",),
        "bias": ("double_blocks.0.img_attn.proj.bias",), "fused q, k and v": ("double_blocks.0.img_attn.qkv.weight",),
        "fused q, k, v and MLP": ("single_blocks.0.linear1.weight",),
    },
)  # fmt: skip

PLACES: Mapping[str, Place] = {
    "kohya": Place("lora_unet_mid_block_0_", flat=True), "comfyui": Place("diffusion_model.blocks.0."),
    "diffusers": Place("unet.mid_block.0."), "torchtune": LANGUAGE, "litgpt": LANGUAGE, "nemo": LANGUAGE, "trtllm": LANGUAGE,
    "gguf": LANGUAGE, "cloneofsimo": UNET, "samlora": SAM, "xlabs": FLUX,
}  # fmt: skip


def place_of(format: str) -> Place:
    return PLACES.get(format, Place())


def row_of(name: str) -> Format:
    return next(row for row in FORMATS if row.name == name)


def options_of(format: str) -> ReadOptions:
    return place_of(format).options


def adapter_of(kind: str, layer: str, format: str, draw: Draw | None = None) -> Adapter:
    """One change of one layer under a name that the format has, with what a file must change too."""
    place = place_of(format)
    draw = draw or Draw(scaling=place.scaling)
    deltas: dict[str, Delta] = {name: KINDS[kind][0](draw, layer) for name in place.named(layer)}
    if layer == "bias":  # its scaling is 1, as the bias's
        deltas |= {name.removesuffix("bias") + "weight": low(draw, "linear", alpha=2.0) for name in place.named(layer)}
    rest = {name: KINDS[kind][0](draw, layer) for name, (kind, layer) in place.rest(layer).items() if name not in deltas}
    return Adapter(deltas | rest, flat=place.flat, model=place.model(layer))


def read(container: Container, format: str, told: Adapter, layer: str) -> Adapter:
    """A file's adapter, where its modules are counted under the names of the base that `told` is of."""
    place = place_of(format)
    found = row_of(format).decode(container, place.options)
    shapes = {name: LAYERS[place.rest(layer).get(name, ("", layer))[1]][2] for name in told}
    base = {name: Spec("F64", shape) for name, shape in shapes.items()}
    return found.resolve(base, Family(dict(place.model(layer)))) if place.counted else found
