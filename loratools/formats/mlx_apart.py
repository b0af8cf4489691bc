"""Stacks that an adapter of MLX-LM's has, met by a checkpoint that has a matrix for each expert.

    ….switch_mlp.gate_proj   (experts, out, in)      ….experts.0.gate_proj.weight, ….experts.1.gate_proj.weight, …

Read from `sanitize` of mlx-lm's models/*.py and `models/switch_layers.py`; the way back is `mlx_experts`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.full import Replacement
from loratools.formats._stack import Member
from loratools.refs import Spec

_STACK = re.compile(r"(?P<root>.+)\.(?:switch_mlp|experts)\.(?P<part>gate_proj|down_proj|up_proj|fc1|fc2)\.weight")
_OLDER = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # Mixtral's words for them
_PLAIN = {"fc1": "up_proj", "fc2": "down_proj"}  # of experts without a gate, in Nemotron-H


def met(deltas: Mapping[str, Delta], base: Mapping[str, Spec]) -> dict[str, Delta]:
    """The deltas, those of stacks as their experts' where the base lacks the stack: as it is under MLX's name in MLX's own checkpoints."""
    found: dict[str, Delta] = {}
    for name, delta in deltas.items():
        found |= ({} if name in base else apart(name, _members(delta))) or {name: delta}
    return found


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


def _members(delta: Delta) -> Sequence[Delta | None]:
    if isinstance(delta, Stacked):
        return delta.members
    if isinstance(delta, Replacement) and len(delta.value.spec.shape) == 3:
        return [Replacement(value=Member(delta.value, index)) for index in range(delta.value.spec.shape[0])]
    return ()
