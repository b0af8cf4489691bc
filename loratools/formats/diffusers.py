"""diffusers: `pytorch_lora_weights.safetensors`, a pipeline's parts as prefixes, and peft's suffixes or the three older spellings.

    unet.MODULE.lora_A.weight (r, in, *kernel)   .lora_B.weight (out, r, 1…)   .lora_B.bias   .lora_magnitude_vector
    unet.MODULE.lora.down.weight   text_encoder.MODULE.lora_linear_layer.down.weight   MODULE.processor.to_q_lora.down.weight

Scales: the metadata `lora_adapter_metadata`, JSON of each part's LoraConfig; else an `alpha` beside a module; else 1, as diffusers
reads it. Read from diffusers 0.42 (`loaders/lora_base.py`, `utils/state_dict_utils.py`, `utils/peft_utils.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from loratools.adapter import Adapter
from loratools.errors import FormatError, LoratoolsError, MatchError, raise_all
from loratools.formats._lora_settings import refused, short
from loratools.formats._module import Slots
from loratools.formats._patterns import compiles, pattern_key
from loratools.formats._scalar import finite
from loratools.formats._scale import exact_alpha
from loratools.formats._slots import SPELLINGS, collect, made
from loratools.formats._unread import check_unread
from loratools.formats.base import Container, ReadOptions

NAME = "diffusers"
METADATA = "lora_adapter_metadata"
PARTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet", "vae",
)  # fmt: skip
_MARKS = (
    ".lora_A.", ".lora_B.", ".lora.down.", ".lora.up.", "_lora.down.", "_lora.up.", ".lora_linear_layer.", ".lora_down.", ".lora_up.",
    ".lokr_w1", ".lokr_w2", ".hada_w1", ".hada_w2",
)  # fmt: skip
_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "single_transformer_blocks")


def detect(container: Container) -> bool:
    """Whether its metadata is diffusers', or its modules lie in a pipeline's parts or in a UNet's or transformer's blocks."""
    if container.config is not None:
        return False
    if METADATA in container.metadata:
        return True
    return any(_ours(key) for key in container.tensors)


def _ours(key: str) -> bool:
    first, _, rest = key.partition(".")
    second = rest.partition(".")[0]
    lora = any(mark in key for mark in _MARKS)
    return lora and (first in _BLOCKS or (first in PARTS and second not in ("h", "word_embeddings", "wte")))


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in a diffusers file, under the pipeline's names.

    Raises FormatError for strays, for metadata that is none, and for alphas given both ways; MatchError for a part of the metadata
    whose tensors say another rank.
    """
    options = options or ReadOptions()
    notes: list[str] = []
    try:
        modules, others = collect(container.tensors, SPELLINGS)
        stated = _stated(container.metadata)
        if stated is None:
            check_unread(container.metadata, modules, options.alpha)
        deltas, faults = made(modules, _alphas(modules, stated, options.alpha, notes))
        faults += [FormatError("neither a LoRA tensor of a part nor an alpha", tensor=key) for key in others]
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    metadata = {"safetensors": dict(container.metadata)}
    return Adapter(deltas, metadata, {}, container.path, NAME, container.files, notes=tuple(notes))


def _stated(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The metadata's settings, each under its part: `unet.r`, `transformer.rank_pattern`; of a lone model without a part."""
    if METADATA not in metadata:
        return None
    try:
        table = json.loads(metadata[METADATA])
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise FormatError(f"metadata {METADATA} is not an object", found=metadata[METADATA][:60])
    read = dict.fromkeys(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"))
    settings = [(name, name.rpartition(".")[2], value) for name, value in table.items()]
    faults = [fault for name, word, value in settings if word not in read for fault in refused({word: value})]
    faults += [
        FormatError(f"metadata {METADATA}: {name}", found=short(value), expected="regular expressions mapped to numbers")
        for name, word, value in settings if word.endswith("_pattern") and not _patterns(value)
    ]  # fmt: skip
    raise_all(faults)
    return table


def _patterns(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(compiles(pattern) for pattern in value))


def _alphas(
    modules: Mapping[str, Slots], stated: Mapping[str, Any] | None, given: float | None, notes: list[str]
) -> Callable[[str, Slots], float | None]:
    held = [module for module, slots in modules.items() if "alpha" in slots]
    if stated is not None and held:
        raise FormatError("an alpha beside the metadata that tells the scales", tensor=modules[held[0]].keys["alpha"])
    if stated is None:
        if len(held) < len(modules) and given is None:
            notes.append(f"{len(modules) - len(held)} modules have no alpha: their scale is 1, as diffusers reads it")
        return lambda module, slots: given
    return lambda module, slots: given if given is not None else _alpha(module, slots, stated)


def _alpha(module: str, slots: Slots, stated: Mapping[str, Any]) -> float:
    """A module's alpha from its part's LoraConfig, by the patterns and the flag for rsLoRA."""
    part, _, path = module.partition(".")
    prefix, path = (f"{part}.", path) if f"{part}.lora_alpha" in stated else ("", module)
    alpha = stated.get(f"{prefix}lora_alpha")
    patterns = stated.get(f"{prefix}alpha_pattern") or {}
    alpha = patterns.get(pattern_key(patterns, path), alpha)
    if not isinstance(alpha, int | float) or not finite(alpha):
        raise FormatError(f"metadata {METADATA} tells no alpha of this module", found=alpha, remedy="give it with --alpha-in A")
    down = slots.refs.get("lora_down.weight")
    rank = down.spec.shape[0] if down is not None else 1
    ranks = stated.get(f"{prefix}rank_pattern") or {}
    said = ranks.get(pattern_key(ranks, path), stated.get(f"{prefix}r"))
    if said is not None and said != rank:
        raise MatchError("the rank is not the metadata's", found=rank, expected=said)
    if bool(stated.get(f"{prefix}use_dora")) != ("magnitude" in slots):
        raise FormatError("use_dora of the metadata and the tensors disagree", found="a magnitude" if "magnitude" in slots else "none")
    return exact_alpha(alpha / math.sqrt(rank), rank) if stated.get(f"{prefix}use_rslora") else float(alpha)
