"""AdaLoRA, C3A, MiSS, DeLoRA and GraLoRA as peft has them: the inverse of what `peft_additive` reads.

The shapes that peft makes of a config were read from peft 0.21.2, `tuners/<method>/layer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.deltas.adalora import AdaLoRA
from loratools.deltas.bat import Bat
from loratools.deltas.c3a import C3A
from loratools.deltas.delora import DeLoRA
from loratools.deltas.gralora import GraLoRA
from loratools.deltas.miss import MiSS
from loratools.formats.peft_writing import Modules, Writing, Written, alike, dotted_patterned, each, patterned, refused, shortest, weights
from loratools.refs import Ref

_UNUSED_R = 8  # AdaLoRA goes by init_r, and peft warns of any r but LoRA's default


def _adalora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    """A schedule is asked for even where nothing trains; masks say how many of the first ranks are left."""
    deltas = weights(modules, AdaLoRA)
    tensors = each(deltas, lambda delta: {"lora_A": delta.A, "lora_B": delta.B, "lora_E": delta.E})
    first = alike({path: delta.first for path, delta in deltas.items()}, "init_r")
    alpha = alike({path: delta.alpha for path, delta in deltas.items()}, "lora_alpha")
    settings = {"init_r": first, "lora_alpha": shortest(alpha), "rank_pattern": _masks(deltas, first, stated), "r": _UNUSED_R}
    return Written(tensors, settings | {"total_step": stated.get("total_step") or 1})


def _masks(deltas: Mapping[str, AdaLoRA], first: int, stated: Mapping[str, Any]) -> dict[str, list[bool]] | None:
    """Those the config has, as far as they fit; else the first ranks are said to be left, for where those gone stood changes nothing."""
    table = stated.get("rank_pattern")
    told = {re.sub(r"\.lora_E(\.[^.]+)?$", "", name): mask for name, mask in (table if isinstance(table, dict) else {}).items()}
    masks: dict[str, list[bool]] = {}
    for path, delta in deltas.items():
        mask = told.get(path)
        if isinstance(mask, list) and len(mask) == first and sum(mask) == delta.rank:
            masks[f"{path}.lora_E"] = mask
        elif delta.rank < first:
            masks[f"{path}.lora_E"] = [True] * delta.rank + [False] * (first - delta.rank)
        elif delta.rank > first:
            raise refused("more ranks than AdaLoRA began with", found=delta.rank, expected=first).at(tensor=f"{path}.weight")
    return masks or None


def _c3a(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, C3A)
    sizes = {path: delta.kernel.spec.shape[2] for path, delta in deltas.items()}
    settings = dotted_patterned(sizes, "block_size", "block_size_pattern")
    return Written(each(deltas, lambda delta: {"c3a_kernel": delta.kernel}), settings | {"init_weights": True})


def _miss(modules: Modules, stated: Mapping[str, Any]) -> Written:
    """`init_weights` says which of the three variants all modules are."""
    deltas = {path: leaves["weight"] for path, leaves in modules.items()}
    variant = alike({path: _variant(delta) for path, delta in deltas.items()}, "init_weights")
    blocks = {path: delta.M if isinstance(delta, Bat) else delta.refs()["block"] for path, delta in deltas.items()}
    ranks = {path: ref.spec.shape[-1 if variant == "bat" else 0] for path, ref in blocks.items()}
    settings = {"r": alike(ranks, "r"), "init_weights": variant}
    if variant == "mini":
        settings["mini_r"] = alike({path: ref.spec.shape[1] for path, ref in blocks.items()}, "mini_r")
    elif variant is True and stated.get("init_weights") is False:
        settings["init_weights"] = False
    return Written(each(blocks, lambda ref: {"miss_block": ref}), settings)


def _variant(delta: object) -> str | bool:
    return "bat" if isinstance(delta, Bat) else "mini" if isinstance(delta, MiSS) and delta.mini else True


def _delora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, DeLoRA)
    ranks = {path: delta.A.spec.shape[0] for path, delta in deltas.items()}
    return Written(each(deltas, _delora_slots), patterned(ranks, "r", "rank_pattern") | {"init_weights": True})


def _delora_slots(delta: DeLoRA) -> dict[str, Ref]:
    return {"delora_A": delta.A, "delora_B": delta.B, "delora_lambda": delta.strength, "delora_w_norm": delta.w_norm}


def _gralora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, GraLoRA)
    settings = {
        "r": alike({path: delta.A.spec.shape[2] for path, delta in deltas.items()}, "r"),
        "hybrid_r": alike({path: delta.rank - delta.A.spec.shape[2] for path, delta in deltas.items()}, "hybrid_r"),
        "gralora_k": alike({path: delta.A.spec.shape[0] for path, delta in deltas.items()}, "gralora_k"),
        "alpha": shortest(alike({path: delta.alpha for path, delta in deltas.items()}, "alpha")),
    }
    return Written(each(deltas, _gralora_slots), settings | {"init_weights": True})


def _gralora_slots(delta: GraLoRA) -> dict[str, Ref]:
    hybrid = {"gralora_A_general.weight": delta.down, "gralora_B_general.weight": delta.up}
    return {"gralora_A": delta.A, "gralora_B": delta.B} | {slot: ref for slot, ref in hybrid.items() if ref is not None}


ADALORA = Writing((AdaLoRA,), _adalora, leaves=("weight",))
C3AS = Writing((C3A,), _c3a, leaves=("weight",))
MISS = Writing((MiSS, Bat), _miss, leaves=("weight",))
DELORA = Writing((DeLoRA,), _delora, leaves=("weight",))
GRALORA = Writing((GraLoRA,), _gralora, leaves=("weight",))
