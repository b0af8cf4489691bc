"""Experts that MLX-LM stacks: one module of three axes for what is a module each in a checkpoint's names.

    ….switch_mlp.gate_proj   (experts, out, in)      ….experts.0.gate_proj.weight, ….experts.1.gate_proj.weight, …

Read from `sanitize` of mlx-lm's models/*.py, `models/switch_layers.py` and `LoRASwitchLinear` of `tuner/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, ShapeError
from loratools.formats._heads import text_config
from loratools.formats._stacks import Stack
from loratools.tensorfile import Ref, Spec

_STACK = re.compile(r"(?P<root>.+)\.(?:switch_mlp|experts)\.(?P<part>gate_proj|down_proj|up_proj|fc1|fc2)\.weight")
_MEMBER = re.compile(r"(?P<root>.+)\.experts\.(?P<number>\d+)\.(?P<part>w1|w2|w3|gate_proj|down_proj|up_proj)\.weight")
_OLDER = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's words for them, by MLX's
_PLAIN = {"fc1": "up_proj", "fc2": "down_proj"}  # of experts without a gate, in Nemotron-H
_UNNAMED = ("afmoe", "dots1", "Klear")  # model types whose stack is called `experts` in MLX too
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def apart(name: str, members: Sequence[Delta | None]) -> dict[str, Delta]:
    """The changes of a stack by the names that its experts have in a checkpoint, nothing where its name is none that is known.

    >>> list(apart("layers.0.block_sparse_moe.switch_mlp.up_proj.weight", ["of 0", "of 1"]))
    ['layers.0.block_sparse_moe.experts.0.w3.weight', 'layers.0.block_sparse_moe.experts.1.w3.weight']
    """
    match = _STACK.fullmatch(name)
    if match is None:
        return {}
    part = _PLAIN.get(match["part"], match["part"])
    part = _OLDER[part] if match["root"].endswith("block_sparse_moe") else part
    return {f"{match['root']}.experts.{number}.{part}.weight": delta for number, delta in enumerate(members) if delta}


def together(deltas: Mapping[str, Delta], base: Mapping[str, Spec]) -> Mapping[str, Delta]:
    """The deltas with experts as one stack where the base is a checkpoint of MLX's own, as they are where it is not."""
    found: dict[str, Delta] = {}
    stacks: dict[str, dict[int, Delta]] = {}
    for name, delta in deltas.items():
        stack, number = next(((stack, number) for stack, number in _stacks(name) if stack in base and name not in base), (None, 0))
        if stack is None:
            found[name] = delta
        else:
            stacks.setdefault(stack, {})[number] = delta
    for stack, members in stacks.items():
        found[stack] = Stacked(members=tuple(members.get(number) for number in range(base[stack].shape[0])))
    return found


def _stacks(name: str) -> list[tuple[str, int]]:
    """(name in MLX, number) that an expert's weight may have there."""
    match = _MEMBER.fullmatch(name)
    if match is None:
        return []
    part = next((part for part, older in _OLDER.items() if older == match["part"]), match["part"])
    plain = [short for short, long in _PLAIN.items() if long == part]
    return [(f"{match['root']}.{word}.{end}.weight", int(match["number"])) for end in (part, *plain) for word in ("switch_mlp", "experts")]


def stack_of(name: str, config: Mapping[str, Any]) -> tuple[str, int] | None:
    """(MLX's module, the expert's number) of a weight in a checkpoint's names, None for one that is no expert's."""
    found = _stacks(name)
    if not found:
        return None
    stack, number = found[text_config(config).get("model_type") in _UNNAMED]
    return stack.removesuffix(".weight"), number


def factors(lows: Mapping[int, tuple[str, LowRank]], config: Mapping[str, Any]) -> dict[str, Ref]:
    """lora_a (experts, r, in) and lora_b (experts, out, r) of all experts. Raises NotExpressible where one lacks or some differ."""
    text = text_config(config)
    count = next((text[key] for key in _COUNTS if type(text.get(key)) is int), max(lows) + 1)
    lacking = sorted(set(range(count)) - set(lows))
    first = next(iter(lows.values()))[0]
    if lacking or len(lows) > count:
        found = f"none of expert {', '.join(map(str, lacking[:4]))}" if lacking else f"{len(lows)} of them"
        raise NotExpressible(f"MLX stacks the LoRA of all {count} experts, and the adapter has not one of each", tensor=first, found=found)
    chosen = [lows[number][1] for number in range(count)]
    try:
        return {"lora_a": Stack([low.A for low in chosen]), "lora_b": Stack([low.B for low in chosen])}
    except ShapeError as error:
        raise _unlike(first, error) from None


def _unlike(name: str, error: ShapeError) -> LoratoolsError:
    fact, remedy = "experts whose factors differ do not stack", "resize --rank makes their ranks one"
    return NotExpressible(fact, tensor=name, found=error.found, expected=error.expected, remedy=remedy)
