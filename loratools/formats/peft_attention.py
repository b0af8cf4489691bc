"""LoRA on torch's `nn.MultiheadAttention`, whose in_proj is a parameter of its own and whose out_proj is a layer within.

    ….mha.lora_A.weight (r, E)                       ….mha.lora_B.weight (3E, r)                       of mha.in_proj_weight
    ….mha.base_layer.out_proj.lora_A.weight (r, E)   ….mha.base_layer.out_proj.lora_B.weight (E, r)    of mha.out_proj.weight

peft 0.21.2 (`tuners/lora/layer.py::MultiheadAttention.merge`), and every version since 0.14, adds out_proj's change twice, in its
forward as when it merges: once itself, once through the layer's own merge. What was trained was trained so; it counts twice here.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from loratools.deltas.base import Delta
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, NotExpressible, UnsupportedError
from loratools.formats._refused import KEPT
from loratools.formats.peft_keys import Module

WITHIN = ".base_layer.out_proj"
IN, OUT = "in_proj_weight", "out_proj.weight"
TWICE = 2.0


def target_of(path: str) -> str:
    """The module that the config targets: an attention, for its out_proj."""
    return path.removesuffix(WITHIN)


def is_attention(path: str, modules: Container[str]) -> bool:
    """Whether a module is a MultiheadAttention: its out_proj is adapted with it, by peft's key."""
    return path.removesuffix(WITHIN) + WITHIN in modules


def attended(path: str, module: Module, low: Delta, modules: Container[str]) -> tuple[str, LowRank]:
    """The base's tensor and its change, of an attention's in_proj or out_proj. Raises FormatError, UnsupportedError."""
    if target_of(path) not in modules:
        raise FormatError("has no lora_A of its attention's in_proj beside it", remedy="the file is incomplete")
    if not isinstance(low, LowRank) or "bias" in module.refs or low.layer == "embedding":
        held = "lora_B.bias" if "bias" in module.refs else low.kind
        raise UnsupportedError(f"{held} on nn.MultiheadAttention, whose forward peft gives plain LoRA alone")
    low = replace(low.transposed() if low.layer == "transposed" else low, layer="linear")
    if path.endswith(WITHIN):
        return f"{target_of(path)}.{OUT}", replace(low, alpha=low.alpha * TWICE)
    return f"{path}.{IN}", low


def apart(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Deltas by the names that peft's keys are made of: an attention's two as `mha.weight` and `mha.base_layer.out_proj.weight`.

    Raises NotExpressible where the two are not as peft makes them: both there, of one rank and one alpha.
    """
    made = dict(deltas)
    for name, first in deltas.items():
        if not name.endswith(f".{IN}") or not isinstance(first, LowRank):
            continue
        path = name.removesuffix(f".{IN}")
        second = deltas.get(f"{path}.{OUT}")
        halved = replace(second, alpha=second.alpha / TWICE) if isinstance(second, LowRank) else None
        if halved is None or halved.rank != first.rank or halved.scaling != first.scaling:
            found = f"rank {first.rank} and {halved.rank}, scaling {first.scaling:g} and {halved.scaling:g}" if halved else "in_proj alone"
            fact, remedy = "peft adapts an attention's in_proj and out_proj alike", "resize --rank and rescale --bake make them alike"
            raise NotExpressible(fact, tensor=name, found=found, remedy=remedy if halved else KEPT)
        del made[name], made[f"{path}.{OUT}"]
        made |= {f"{path}.weight": first, f"{path}{WITHIN}.weight": halved}
    return made
