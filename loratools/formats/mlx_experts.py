"""A stack of experts as MLX-LM has it: the LoRA of all of them in two tensors, and where its model keeps the stack.

    MODULE.lora_a (experts, r, in)   MODULE.lora_b (experts, out, r)      `LoRASwitchLinear` of mlx_lm/tuner/lora.py

MLX stacks `mlp.experts.E.gate_proj` of a checkpoint as `mlp.switch_mlp.gate_proj`, mixtral's `block_sparse_moe.experts.E.w1` as
`block_sparse_moe.switch_mlp.gate_proj`, and so on (`sanitize` of mlx_lm/models/*.py); which models' is told by their type.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible
from loratools.formats._experts import apart
from loratools.formats._heads import text_config
from loratools.formats._refused import BAKE, KEPT, RESIZE
from loratools.formats._stack import Stack
from loratools.refs import Ref

SPARSE = ("mixtral", "phimoe")
SWITCHED = (
    "qwen2_moe", "qwen3_moe", "olmoe", "deepseek", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "exaone_moe", "hunyuan",
    "bailing_moe", "mimo_v2_flash", *SPARSE,
)  # fmt: skip
_EXPERT = re.compile(
    r"(?P<root>.+)\.(?P<place>mlp|block_sparse_moe)\.experts\.(?P<index>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj|w[123])\.weight"
)
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def count_of(config: Mapping[str, Any]) -> int:
    """How many experts a model's config says each stack has, 0 where it says none."""
    text = text_config(config)
    return next((text[key] for key in _COUNTS if type(text.get(key)) is int), 0)


def stacks(deltas: Mapping[str, Delta], types: Iterable[str], count: int = 0) -> dict[str, Delta]:
    """The deltas, those of single experts or of fused ones as stacks under MLX's names, where the model's type is one it stacks so.

    A stack has `count` members at least: those that lack are None.
    """
    kinds = set(types)
    if not kinds & set(SWITCHED):
        return dict(deltas)
    found: dict[str, Delta] = {}
    members: dict[str, dict[int, Delta]] = defaultdict(dict)
    for name, delta in apart(deltas, kinds).items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[name] = delta
            continue
        place = "block_sparse_moe" if kinds & set(SPARSE) else match["place"]
        leaf = _LEAVES.get(match["leaf"], match["leaf"])
        members[f"{match['root']}.{place}.switch_mlp.{leaf}.weight"][int(match["index"])] = delta
    return found | {name: Stacked(members=tuple(own.get(i) for i in range(max(count, max(own) + 1)))) for name, own in members.items()}


def factors(stack: Stacked) -> tuple[Ref, Ref, LowRank]:
    """(lora_a, lora_b) of a stack, and one of its members, all of which have its rank and scaling. Raises NotExpressible for others."""
    lows = [member for member in stack.members if isinstance(member, LowRank) and len(member.A.spec.shape) == 2]
    if len(lows) < len(stack.members):
        gone = next(index for index, member in enumerate(stack.members) if not isinstance(member, LowRank))
        raise NotExpressible("MLX has LoRA on all experts of a stack", found=f"none on expert {gone}", remedy=KEPT)
    plain = [low.transposed() if low.layer == "transposed" else low for low in lows]
    other = next((low for low in plain if low.rank != plain[0].rank), None)
    if other is not None:
        what, expected = "MLX has one rank for all modules", f"{plain[0].rank}, as another expert has"
        raise NotExpressible(what, found=other.rank, expected=expected, remedy=RESIZE)
    other = next((low for low in plain if low.scaling != plain[0].scaling), None)
    if other is not None:
        what, expected = "MLX has one scale for all modules", f"{plain[0].scaling}, as another expert has"
        raise NotExpressible(what, found=other.scaling, expected=expected, remedy=BAKE)
    return Stack([low.A for low in plain]), Stack([low.B for low in plain]), plain[0]
