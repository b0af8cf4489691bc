"""What the metadata of a kohya file says of the network that made it, so that it is true of the tensors beside it.

Keys as sd-scripts `train_network.py` and `networks/resize_lora.py` write them: `ss_network_module`, `ss_network_dim`, `ss_network_alpha`,
"Dynamic" where modules differ, and the JSON object `ss_network_args`, of which `algo`, `conv_dim` and `conv_alpha` are told here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping

from loratools.formats._module import Slots
from loratools.formats._scalar import scalar
from loratools.formats._slots import collect
from loratools.formats._turned import OWN
from loratools.refs import Ref

MODULE, DIM, ALPHA, ARGS = "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"
MIXED = "Dynamic"
_LORA = "networks.lora"
_SD_SCRIPTS = re.compile(r"networks\.(?!oft)\w+")  # networks of LoRA, whatever the model
_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a2.weight")  # whose first axis is the rank
_ALGORITHMS = {
    "lora_down.weight": ("lora", "locon", "dylora"), "hada_w1_b": ("loha",), "lokr_w1": ("lokr",), "lokr_w1_a": ("lokr",),
    "a1.weight": ("glora",), "diff": ("full",), "w_norm": ("full",), "on_input": ("ia3",),
}  # fmt: skip


def network(tensors: Mapping[str, Ref], stated: Mapping[str, str]) -> dict[str, str]:
    """The metadata with what it says of the network made true; a statement that is true stays as it is spelt.

    What the tensors do not tell, such as the dim of (IA)³, is taken out.
    """
    modules, _ = collect(tensors)
    told: dict[str, str | None] = {MODULE: _module(modules, stated.get(MODULE, ""))}
    near = [slots for slots in modules.values() if not _wide(slots)]
    wide = [slots for slots in modules.values() if _wide(slots)]
    told[DIM], told[ALPHA] = _one(_ranks(near or wide), stated.get(DIM)), _one(_alphas(near or wide), stated.get(ALPHA))
    told[ARGS] = _arguments(stated.get(ARGS), modules, wide if near else [], lycoris=told[MODULE] == "lycoris.kohya")
    return {key: value for key, value in {**stated, **told}.items() if value is not None}


def _wide(slots: Slots) -> bool:
    """Whether it is a convolution of a kernel above 1, of which sd-scripts' networks have a dim of its own."""
    down = slots.refs.get("lora_down.weight")
    return "lora_mid.weight" in slots or (down is not None and any(size != 1 for size in down.spec.shape[2:]))


def _module(modules: Mapping[str, Slots], stated: str) -> str:
    if modules and all(name.startswith(OWN) for name in modules):
        return stated if stated.startswith("networks.oft") else "networks.oft"
    if any(not slot.startswith(("lora_down", "lora_up")) and slot != "alpha" for slots in modules.values() for slot in slots.refs):
        return "lycoris.kohya"
    return stated if _SD_SCRIPTS.fullmatch(stated) or stated == "lycoris.kohya" else _LORA


def _ranks(modules: Iterable[Slots]) -> list[float]:
    ranked = [(slots, next((slot for slot in _RANKED if slot in slots), None)) for slots in modules]
    own = [slots.refs[slot].spec.shape[0] for slots in modules for slot in slots.refs if slot.startswith("oft_blocks") and _own(slots)]
    return [float(slots.refs[slot].spec.shape[0]) for slots, slot in ranked if slot is not None] + [float(count) for count in own]


def _alphas(modules: Iterable[Slots]) -> list[float]:
    ranked = [slots for slots in modules if "alpha" in slots and (_own(slots) or slots.refs.keys() & {*_RANKED})]
    return [scalar(slots.refs["alpha"], "alpha") for slots in ranked]


def _own(slots: Slots) -> bool:
    return next(iter(slots.keys.values())).startswith(OWN)


def _one(values: list[float], stated: str | None) -> str | None:
    """The one value as text, "Dynamic" for several, nothing for none; what was stated where it says the same."""
    if not values:
        return None
    if len(set(values)) > 1:
        return MIXED
    if stated is not None and _number(stated) == values[0]:
        return stated
    return str(int(values[0])) if values[0] == int(values[0]) else repr(values[0])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _arguments(text: str | None, modules: Mapping[str, Slots], wide: list[Slots], *, lycoris: bool) -> str | None:
    """The arguments with those made true that the tensors tell; text that is no JSON object is not of this kind, and stays."""
    try:
        given = json.loads(text) if text is not None else {}
    except ValueError:
        return text
    if not isinstance(given, dict):
        return text
    found = {algorithms for slots in modules.values() if (algorithms := _algorithms(slots)) is not None}
    algorithms = found.pop() if len(found) == 1 else ()
    made = {key: value for key, value in given.items() if key not in ("algo", "conv_dim", "conv_alpha")}
    told = {
        "algo": (given.get("algo") if given.get("algo") in algorithms else next(iter(algorithms), None)) if lycoris else None,
        "conv_dim": _one(_ranks(wide), given.get("conv_dim")), "conv_alpha": _one(_alphas(wide), given.get("conv_alpha")),
    }  # fmt: skip
    made |= {key: value for key, value in told.items() if value is not None}
    if made == given:
        return text
    return json.dumps(made) if made else None


def _algorithms(slots: Slots) -> tuple[str, ...] | None:
    """LyCORIS' names for what a module holds; None for what goes along with any."""
    if "oft_blocks" in slots:
        return ("diag-oft",) if len(slots.refs["oft_blocks"].spec.shape) == 3 else ("boft",)
    return next((names for slot, names in _ALGORITHMS.items() if slot in slots and slot != "w_norm"), None)
