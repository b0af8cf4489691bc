"""The order in which cloneofsimo's `lora_diffusion` comes past a Stable Diffusion's modules: what its files have instead of names.

`_find_modules_v2` (`lora_diffusion/lora.py`) takes every Linear (and Conv2d, in its extended form) below a module of the target
classes, as `named_modules` has them: in the order of registration, which a checkpoint does not keep. It is, in diffusers' UNet,
down_blocks, up_blocks, mid_block, in a block attentions before resnets, and in a transformer block attn1, ff, attn2 until diffusers
moved ff behind attn2; in transformers' CLIPAttention k, v, q, out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from loratools.refs import Spec

PARTS = ("unet", "text_encoder")
ERAS = ("attn1, ff, attn2", "attn1, attn2, ff")  # the older first
DEFAULTS: Mapping[str, tuple[frozenset[str], ...]] = {  # the sets that its programs train, for files that do not tell theirs
    "unet": (
        frozenset({"CrossAttention", "Attention"}), frozenset({"CrossAttention", "Attention", "GEGLU"}),
        frozenset({"CrossAttention", "Attention", "GEGLU", "ResnetBlock2D"}),
    ),
    "text_encoder": (frozenset({"CLIPAttention"}),),
}  # fmt: skip
_ATTENTION = re.compile(r"(.+\.)?transformer_blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)\.weight")
_PLACES = {
    "CrossAttention": _ATTENTION,
    "Attention": _ATTENTION,
    "GEGLU": re.compile(r"(.+\.)?transformer_blocks\.\d+\.ff\.net\.0\.proj\.weight"),
    "ResnetBlock2D": re.compile(r"(.+\.)?resnets\.\d+\.(conv1|time_emb_proj|conv2|conv_shortcut)\.weight"),
    "CLIPAttention": re.compile(r"(.+\.)?layers\.\d+\.self_attn\.(k_proj|v_proj|q_proj|out_proj)\.weight"),
}
_RANKS = (
    ("down_blocks", "up_blocks", "mid_block"), ("attentions", "resnets"), ("to_q", "to_k", "to_v", "to_out"),
    ("conv1", "time_emb_proj", "conv2", "conv_shortcut"), ("k_proj", "v_proj", "q_proj", "out_proj"),
)  # fmt: skip
_RANK = {word: place for words in _RANKS for place, word in enumerate(words)}


def known(target: str) -> bool:
    """Whether it is known which modules lie below this class.

    >>> known("GEGLU"), known("Transformer2DModel")
    (True, False)
    """
    return target in _PLACES


def walk(names: Iterable[str], targets: Iterable[str], era: str) -> list[str]:
    """Those of a model's tensor names that are weights of the target classes' layers, in the order in which they are counted.

    >>> walk(["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", "up_blocks.1.attentions.0.transformer_blocks.0.attn1."
    ...       "to_v.weight", "up_blocks.1.attentions.0.proj_in.weight"], ["Attention"], ERAS[0])[0][:11]
    'up_blocks.1'
    """
    places = {_PLACES[target] for target in targets}
    found = [name for name in names if any(place.fullmatch(name) for place in places)]
    order = {word: place for place, word in enumerate(era.split(", "))}
    return sorted(found, key=lambda name: [_weight(word, order) for word in name.split(".")])


def _weight(word: str, order: Mapping[str, int]) -> tuple[int, str]:
    return (int(word), "") if word.isdigit() else (order.get(word, _RANK.get(word, 0)), "" if word in order or word in _RANK else word)


@cache
def stable_diffusion(part: str, version: int) -> Mapping[str, Spec]:
    """Names and shapes of the layers that can be changed, of Stable Diffusion 1 or 2; biases and norms are not among them."""
    cross, layers = ((768, 12), (1024, 23))[version - 1]
    shapes = _unet(cross) if part == "unet" else _text_encoder(cross, layers)
    return {f"{name}.weight": Spec("F32", shape) for name, shape in shapes.items()}


def _unet(cross: int) -> dict[str, tuple[int, ...]]:
    widths = (320, 640, 1280, 1280)
    shapes = _resnet("mid_block.resnets.0", 1280, 1280) | _resnet("mid_block.resnets.1", 1280, 1280) | _block("mid_block", 0, 1280, cross)
    before = widths[0]
    for level, width in enumerate(widths):
        for index in range(2):
            shapes |= _resnet(f"down_blocks.{level}.resnets.{index}", before if index == 0 else width, width)
            shapes |= _block(f"down_blocks.{level}", index, width, cross) if level < 3 else {}
        before = width
    for level, width in enumerate(widths[::-1]):
        beside = (*widths[::-1], widths[0])[level + 1]  # of the skipped connection from the level above
        for index in range(3):
            into = (before if index == 0 else width) + (beside if index == 2 else width)
            shapes |= _resnet(f"up_blocks.{level}.resnets.{index}", into, width)
            shapes |= _block(f"up_blocks.{level}", index, width, cross) if level > 0 else {}
        before = width
    return shapes


def _block(path: str, index: int, width: int, cross: int) -> dict[str, tuple[int, ...]]:
    root = f"{path}.attentions.{index}.transformer_blocks.0"
    square = (width, width)
    shapes: dict[str, tuple[int, ...]] = {f"{root}.ff.net.0.proj": (8 * width, width)}
    for name, into in (("attn1", width), ("attn2", cross)):
        shapes |= {f"{root}.{name}.to_q": square, f"{root}.{name}.to_out.0": square}
        shapes |= {f"{root}.{name}.to_k": (width, into), f"{root}.{name}.to_v": (width, into)}
    return shapes


def _resnet(path: str, into: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{path}.conv1": (width, into, 3, 3), f"{path}.conv2": (width, width, 3, 3)}
    shapes[f"{path}.time_emb_proj"] = (width, 1280)
    return shapes | ({f"{path}.conv_shortcut": (width, into, 1, 1)} if into != width else {})


def _text_encoder(width: int, layers: int) -> dict[str, tuple[int, ...]]:
    roots = [f"text_model.encoder.layers.{layer}.self_attn" for layer in range(layers)]
    return {f"{root}.{name}": (width, width) for root in roots for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
