"""The tensors of kohya's, LyCORIS' and ComfyUI's files by module and by the suffixes they share; `_kinds` makes deltas of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from loratools.deltas.base import Delta
from loratools.deltas.full import Full
from loratools.errors import FormatError, LoratoolsError
from loratools.formats._kinds import KINDS
from loratools.formats._module import OTHERS, Slots
from loratools.refs import Ref

_OWN = (
    r"lora_(?:down|up|mid)\.weight|alpha|dora_scale|hada_[wt][12](?:_[ab])?|lokr_w[12](?:_[ab])?|lokr_t2|diff|diff_b|w_norm|b_norm|on_input"
    r"|[ab][12]\.weight|bm\.weight|oft_blocks(?:\.\d+)?|oft_diag|rescale|scalar|set_weight|reshape_weight"
)
SUFFIX = re.compile(rf"(?P<module>.+?)\.(?P<slot>{_OWN}|weight)")
SPELLINGS = re.compile(rf"(?P<module>.+?)\.(?P<slot>{_OWN}|{'|'.join(re.escape(text) for text in OTHERS)})")
# diffusers in 2023: attn1.processor.to_q_lora.down.weight is a tensor of attn1.to_q
_PROCESSOR = re.compile(r"(?P<module>.+)\.processor\.(?P<part>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight")

# what is nothing without another, by which its kind is known
_HALVES = {
    "lora_up.weight": "lora_down.weight", "lora_mid.weight": "lora_down.weight", "hada_w1_a": "hada_w1_b", "hada_w2_a": "hada_w1_b",
    "hada_w2_b": "hada_w1_b", "lokr_w1_b": "lokr_w1_a", "lokr_w2": "lokr_w1", "lokr_w2_a": "lokr_w1", "lokr_w2_b": "lokr_w1",
    "dora_scale": "lora_down.weight", "magnitude": "lora_down.weight",
}  # fmt: skip


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
            if leaf in found:
                raise FormatError(f"two differences of one {leaf}", tensor=slots.keys[slot])
            found[leaf] = Full(diff=slots[slot])
    unused = [key for slot, key in slots.keys.items() if slot not in slots.used]
    if unused or not found:
        what = "not used by this kind of change" if found else "no kind of change that is known"
        raise FormatError(what, tensor=(unused or list(slots.keys.values()))[0], found=", ".join(kinds) or None)
    return found


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
    return None if match is None else (match["module"], OTHERS.get(match["slot"], match["slot"]))


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
