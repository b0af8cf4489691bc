"""What kohya's, LyCORIS' and ComfyUI's files hold of one module, by the suffixes they share, as deltas.

Formulas: sd-scripts `networks/lora.py`, lycoris-lora 4.1.3 `modules/*.py` (its forwards: `get_diff_weight` of LoHa and LoKr scales twice),
ComfyUI `comfy/weight_adapter/*.py`; spec/formats/kohya.md tells them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Additive, Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.dora import DoRA
from loratools.deltas.flat import FlatDoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rotated import Rotated
from loratools.deltas.scaled import Scaled
from loratools.deltas.tucker import Tucker
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, ShapeError
from loratools.formats._scalar import scalar
from loratools.tensorfile import Ref

_OWN = (
    r"lora_(?:down|up|mid)\.weight|alpha|dora_scale|hada_[wt][12](?:_[ab])?|lokr_w[12](?:_[ab])?|lokr_t2|diff|diff_b|w_norm|b_norm|on_input"
    r"|[ab][12]\.weight|bm\.weight|oft_blocks|oft_diag|rescale|scalar|set_weight|reshape_weight"
)
SUFFIX = re.compile(rf"(?P<module>.+?)\.(?P<slot>{_OWN}|weight)")
# other spellings of the same things: peft's, those of diffusers' older releases, and bare ones
_OTHERS = {
    "lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_A.default.weight": "lora_down.weight",
    "lora_B.default.weight": "lora_up.weight", "lora.down.weight": "lora_down.weight", "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight", "lora_linear_layer.up.weight": "lora_up.weight", "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight", "lora_B.bias": "lora_bias", "lora_B.default.bias": "lora_bias", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_magnitude_vector.default.weight": "magnitude", "magnitude": "magnitude",
}  # fmt: skip
SPELLINGS = re.compile(rf"(?P<module>.+?)\.(?P<slot>{_OWN}|{'|'.join(re.escape(text) for text in _OTHERS)})")
# diffusers in 2023: attn1.processor.to_q_lora.down.weight is a tensor of attn1.to_q
_PROCESSOR = re.compile(r"(?P<module>.+)\.processor\.(?P<part>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight")


@dataclass
class Slots:
    """One module's tensors by suffix, and the keys they came from; what a kind takes is remembered."""

    refs: dict[str, Ref] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    def __getitem__(self, slot: str) -> Ref:
        if slot not in self.refs:
            raise FormatError(f"has no {self.spelt(slot)} beside it", tensor=self.first, remedy="the file is incomplete")
        self.used.add(slot)
        return self.refs[slot]

    @property
    def first(self) -> str:
        """The key that stands for the module in a message: that of a factor rather than of its alpha."""
        return next((key for slot, key in self.keys.items() if slot != "alpha"), next(iter(self.keys.values())))

    def spelt(self, slot: str) -> str:
        """A slot as this file would spell it."""
        pair = ("lora_down.weight", "lora_up.weight")
        if slot not in pair or (key := self.keys.get(pair[slot == pair[0]])) is None:
            return slot
        suffix = max((text for text in (*_OTHERS, *pair) if key.endswith(text)), key=len, default=pair[slot == pair[0]])
        for words in (("lora_A", "lora_B"), ("down", "up")):
            here, there = words if slot == pair[1] else words[::-1]
            if here in suffix:
                return suffix.replace(here, there)
        return slot

    def get(self, slot: str) -> Ref | None:
        self.used.add(slot)
        return self.refs.get(slot)

    def __contains__(self, slot: str) -> bool:
        return slot in self.refs

    def number(self, slot: str) -> float:
        """The one number that a slot holds. Raises FormatError where it is none."""
        try:
            return scalar(self[slot], slot)
        except LoratoolsError as error:
            raise error.at(tensor=self.keys[slot]) from None

    def alpha(self, rank: int, given: float | None) -> float:
        """The alpha in the file, else the one a user gave, else the rank, which is what trainers mean by none."""
        ref = self.get("alpha")
        if ref is None:
            return float(rank) if given is None else given
        value = self.number("alpha")
        if value == 0 and given is None:
            raise AmbiguousError(
                "alpha is 0, which kohya reads as the rank and ComfyUI as no effect", tensor=self.keys["alpha"],
                remedy="give the one it was trained with by --alpha-in A",
            )  # fmt: skip
        return given if value == 0 and given is not None else value


def deltas_of(slots: Slots, alpha: float | None) -> dict[str, Delta]:
    """The module's deltas by the last component of their tensor's name.

    Raises FormatError for a module that is of no kind or of several, and for tensors that its kind does not use.
    """
    kinds = [kind for kind in KINDS if kind in slots]
    if len(kinds) > 1:
        raise FormatError("of several kinds at once", tensor=slots.first, found=", ".join(kinds))
    found: dict[str, Delta] = {}
    half = next((slot for slot in _HALVES if slot in slots), None) if not kinds else None
    if half is not None:
        slots[_HALVES[half]]  # raises: it is what the kind would be known by
    if kinds:
        found = dict(KINDS[kinds[0]](slots, alpha))
    for slot, leaf in (("diff_b", "bias"), ("b_norm", "bias")):
        if slot in slots:
            found[leaf] = Full(diff=slots[slot])
    unused = [key for slot, key in slots.keys.items() if slot not in slots.used]
    if unused or not found:
        what = "not used by this kind of change" if found else "no kind of change that is known"
        raise FormatError(what, tensor=(unused or list(slots.keys.values()))[0], found=", ".join(kinds) or None)
    return found


# -- kinds, each by the suffix that only it has


def _lora(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    down, up, mid = slots["lora_down.weight"], slots["lora_up.weight"], slots.get("lora_mid.weight")
    scale = slots.alpha(down.spec.shape[0], alpha)
    _check_tail(up, slots.keys["lora_up.weight"])
    if mid is not None:
        _check_tail(down, slots.keys["lora_down.weight"])
        return _decomposed(slots, Tucker(up=_matrix(up), mid=mid, down=_matrix(down), alpha=scale))
    low = LowRank(A=down, B=_matrix(up), alpha=scale, layer="conv" if len(down.spec.shape) > 2 else "linear")
    bias = slots.get("lora_bias")
    return {**_decomposed(slots, low), **({} if bias is None else {"bias": Full(diff=bias, scale=low.scaling)})}


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
        return _decomposed(slots, LoKr(**refs, scale=1.0, alpha=None if told is None else slots.number("alpha")))
    rank = ranked.spec.shape[0]
    scale = slots.alpha(rank, alpha)
    return _decomposed(slots, LoKr(**refs, scale=scale / rank, alpha=scale))


def _turned(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    """Rotations of the outputs: blocks (n, b, b) once, (m, n, b, b) in turn; alpha bounds the norm of all their numbers as one."""
    numbers, told, scale = slots["oft_blocks"], slots.get("alpha"), slots.get("rescale")
    shape = numbers.spec.shape
    if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
        expected = "[blocks, b, b] or [factors, blocks, b, b]"
        raise ShapeError("no blocks of rotations", tensor=slots.keys["oft_blocks"], found=list(shape), expected=expected)
    constraint = 0.0 if told is None else slots.number("alpha")
    bound = constraint * shape[-1] * shape[-3] if constraint > 0 else None
    if len(shape) == 3:  # diag_oft.py contracts over the first axis of a rotation, which is its inverse; boft.py over the second
        return {"weight": Rotated(numbers=numbers, side="out", scale=scale, factor=-1.0, bound=bound, together=True, floor=1e-8)}
    return {"weight": Butterfly(numbers=numbers, side="out", scale=scale, halves=False, bound=bound, together=True, floor=1e-8)}


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


def _glora(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    names = ("a1", "a2", "b1", "b2")
    a1, a2, b1, b2 = (slots[f"{name}.weight"] for name in names)
    for name, ref in (("a1", a1), ("a2", a2), ("b1", b1)):
        _check_tail(ref, slots.keys[f"{name}.weight"])
    scale = slots.alpha(a2.spec.shape[0], alpha)
    return {"weight": Adjoined(a1=_matrix(a1), a2=_matrix(a2), b1=_matrix(b1), b2=b2, alpha=scale)}


KINDS: dict[str, Callable[[Slots, float | None], Mapping[str, Delta]]] = {
    "lora_down.weight": _lora,
    "hada_w1_b": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "a1.weight": _glora,
    "oft_blocks": _turned,
    "diff": _full,
    "w_norm": _norm,
    "on_input": _ia3,
    "set_weight": _set,
}


# what is nothing without another, by which its kind is known
_HALVES = {
    "lora_up.weight": "lora_down.weight", "lora_mid.weight": "lora_down.weight", "hada_w1_a": "hada_w1_b", "hada_w2_a": "hada_w1_b",
    "hada_w2_b": "hada_w1_b", "lokr_w1_b": "lokr_w1_a", "lokr_w2": "lokr_w1", "lokr_w2_a": "lokr_w1", "lokr_w2_b": "lokr_w1",
    "dora_scale": "lora_down.weight", "magnitude": "lora_down.weight",
}  # fmt: skip


def _decomposed(slots: Slots, direction: Additive) -> Mapping[str, Delta]:
    """The change itself, or, where a `dora_scale` lies beside it, the weight under that magnitude."""
    plain, magnitude = slots.get("magnitude"), slots.get("dora_scale")
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


def _matrix(ref: Ref) -> Ref:
    return ref.reshape(*ref.spec.shape[:2])


def _check_tail(ref: Ref, key: str) -> None:
    if len(ref.spec.shape) < 2 or any(size != 1 for size in ref.spec.shape[2:]):
        raise ShapeError("not a matrix", tensor=key, found=list(ref.spec.shape), expected="[rows, columns], or with axes of 1 behind")


def collect(tensors: Mapping[str, Ref], grammar: re.Pattern[str] = SUFFIX) -> tuple[dict[str, Slots], dict[str, Ref]]:
    """The file's tensors by module, and those whose suffix is none of the family's.

    Raises FormatError for a tensor that is there under two spellings.
    """
    modules: dict[str, Slots] = {}
    others: dict[str, Ref] = {}
    for key, ref in tensors.items():
        place = _place(key, grammar)
        if place is None:
            others[key] = ref
            continue
        slots = modules.setdefault(place[0], Slots())
        if place[1] in slots.refs:
            raise FormatError("the same tensor twice under two spellings", tensor=key, found=slots.keys[place[1]])
        slots.refs[place[1]], slots.keys[place[1]] = ref, key
    return modules, others


def _place(key: str, grammar: re.Pattern[str]) -> tuple[str, str] | None:
    """(module, slot) of a key, or None."""
    if grammar is SPELLINGS and (match := _PROCESSOR.fullmatch(key)):
        part = "to_out.0" if match["part"] == "to_out" else match["part"]
        return f"{match['module']}.{part}", f"lora_{match['side']}.weight"
    match = grammar.fullmatch(key)
    return None if match is None else (match["module"], _OTHERS.get(match["slot"], match["slot"]))


def made(modules: Mapping[str, Slots], alpha: Callable[[str, Slots], float | None]) -> tuple[dict[str, Delta], list[LoratoolsError]]:
    """All modules' deltas by tensor name, and the faults of those that have one; `alpha` tells a module's where it holds none."""
    deltas: dict[str, Delta] = {}
    faults: list[LoratoolsError] = []
    for module, slots in modules.items():
        try:
            deltas |= {f"{module}.{leaf}": delta for leaf, delta in deltas_of(slots, alpha(module, slots)).items()}
        except LoratoolsError as error:
            faults.append(error.at(tensor=slots.first))
    return deltas, faults
