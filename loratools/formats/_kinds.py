"""The kinds of change that kohya's, LyCORIS' and ComfyUI's files hold, each by the suffix that only it has, as deltas.

Formulas: sd-scripts `networks/lora.py` and `networks/oft*.py`, lycoris-lora 4.1.3 `modules/*.py` (its forwards: `get_diff_weight` of LoHa
and LoKr scales twice), ComfyUI `comfy/weight_adapter/*.py`; spec/formats/kohya.md tells them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loratools.deltas.base import Additive, Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.flat import FlatDoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.padded import Padded
from loratools.deltas.scaled import Scaled
from loratools.deltas.tucker import Tucker
from loratools.errors import FormatError, ShapeError
from loratools.formats._module import Slots, check_tail, matrix
from loratools.formats._scalar import whole_numbers
from loratools.formats._turned import glora, own_rotations, rotations


def _lora(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    down, up, mid = slots["lora_down.weight"], slots["lora_up.weight"], slots.get("lora_mid.weight")
    scale = slots.alpha(down.spec.shape[0], alpha)
    check_tail(up, slots.keys["lora_up.weight"])
    if mid is not None:
        check_tail(down, slots.keys["lora_down.weight"])
        if len(set(mid.spec.shape[:2])) > 1:  # of two ranks nothing tells which alpha is divided by
            expected = "[r, r, *kernel]"
            raise ShapeError("not a core of one rank", tensor=slots.keys["lora_mid.weight"], found=list(mid.spec.shape), expected=expected)
        return _padded(slots, _decomposed(slots, Tucker(up=matrix(up), mid=mid, down=matrix(down), alpha=scale)))
    low = LowRank(A=down, B=matrix(up), alpha=scale, layer="conv" if len(down.spec.shape) > 2 else "linear")
    bias = slots.get("lora_bias")
    return {**_padded(slots, _decomposed(slots, low)), **({} if bias is None else {"bias": Full(diff=bias, scale=low.scaling)})}


def _padded(slots: Slots, found: Mapping[str, Delta]) -> Mapping[str, Delta]:
    """ComfyUI's `reshape_weight`: the weight grows to a shape, with zeros, before it is changed."""
    told = slots.get("reshape_weight")
    return found if told is None else {"weight": Padded(delta=found["weight"], size=whole_numbers(told, "reshape_weight"))}


def _loha(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    refs = {name: slots[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    rank = refs["w1_b"].spec.shape[0]
    scale = slots.alpha(rank, alpha)
    return _decomposed(slots, LoHa(**refs, t1=slots.get("hada_t1"), t2=slots.get("hada_t2"), scale=scale / rank, alpha=scale))


def _lokr(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    """Of two whole factors the scale is 1, whatever the alpha; else alpha by the rank of the one that is a product."""
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    refs: dict[str, Any] = {name: slots[f"lokr_{name}"] for name in names if f"lokr_{name}" in slots}
    ranked = refs.get("w1_b", refs.get("w2_b"))
    if ranked is None:
        told = slots.get("alpha")
        return _decomposed(slots, LoKr(**refs, scale=1.0, alpha=None if told is None else slots.stated_alpha()))
    rank = ranked.spec.shape[0]
    scale = slots.alpha(rank, alpha)
    return _decomposed(slots, LoKr(**refs, scale=scale / rank, alpha=scale))


def _full(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    slots.get("alpha")  # LyCORIS reads none here
    return _decomposed(slots, Full(diff=slots["diff"]))


def _norm(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    slots.get("alpha")
    return {"weight": Full(diff=slots["w_norm"])}


def _ia3(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    slots.get("alpha")
    return {"weight": Scaled(l=slots["weight"], axis=1 if slots.number("on_input") else 0, offset=1.0)}


def _set(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    return {"weight": Replacement(value=slots["set_weight"], new=False)}


KINDS: dict[str, Callable[[Slots, float | None], Mapping[str, Delta]]] = {
    "lora_down.weight": _lora,
    "hada_w1_b": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "a1.weight": glora,
    "oft_blocks": rotations,
    "oft_blocks.0": own_rotations,
    "diff": _full,
    "w_norm": _norm,
    "on_input": _ia3,
    "set_weight": _set,
}


def _decomposed(slots: Slots, direction: Additive) -> Mapping[str, Delta]:
    """The change itself, or, where a `dora_scale` lies beside it, the weight under that magnitude."""
    plain, magnitude = slots.get("magnitude"), slots.get("dora_scale")
    if plain is not None and magnitude is not None:
        raise FormatError("magnitudes under two spellings", tensor=slots.keys["dora_scale"], found=slots.keys["magnitude"])
    if plain is not None:  # peft's: flat, or (1, out, 1, …) of a convolution; of its outputs always
        return {"weight": DoRA(direction=direction, magnitude=plain.reshape(plain.spec.numel, 1))}
    if magnitude is None:
        return {"weight": direction}
    shape, (out, width, *_) = magnitude.spec.shape, direction.shape()
    if len(shape) == 1 and out == width:  # of its outputs or of its inputs: the base's norms tell, or it is an error with both readings
        return {"weight": FlatDoRA(direction=direction, magnitude=magnitude)}
    if len(shape) == 1:
        magnitude = magnitude.reshape(*((out, 1) if shape[0] == out else (1, shape[0])))
    return {"weight": DoRA(direction=direction, magnitude=magnitude)}
