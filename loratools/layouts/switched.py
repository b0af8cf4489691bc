"""MLX-LM's names of stacked experts, `mlp.switch_mlp.gate_proj`, as those that a checkpoint of transformers has of each expert.

The inverse of `sanitize` in mlx_lm/models/*.py, which stacks `mlp.experts.E.gate_proj`, and mixtral's `block_sparse_moe.experts.E.w1`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked

_STACK = re.compile(r"(?P<root>(?:.+\.)?(?P<place>mlp|block_sparse_moe))\.switch_mlp\.(?P<leaf>gate_proj|up_proj|down_proj)\.weight")
_WORDS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def unswitched(deltas: Mapping[str, Delta], base: Collection[str]) -> Mapping[str, Delta]:
    """The deltas with those of MLX's stacks as one for each expert, where the base has no such stacks itself.

    >>> list(unswitched({"a.mlp.switch_mlp.up_proj.weight": Stacked(members=(None, None))}, ["a.mlp.switch_mlp.up_proj.weight"]))
    ['a.mlp.switch_mlp.up_proj.weight']
    """
    if any(".switch_mlp." in name for name in base) or not any(".switch_mlp." in name for name in deltas):
        return deltas
    found: dict[str, Delta] = {}
    for name, delta in deltas.items():
        match = _STACK.fullmatch(name) if isinstance(delta, Stacked) else None
        if match is None or not isinstance(delta, Stacked):
            found[name] = delta
            continue
        leaf = _WORDS[match["leaf"]] if match["place"] == "block_sparse_moe" else match["leaf"]
        members = ((index, member) for index, member in enumerate(delta.members) if member is not None)
        found |= {f"{match['root']}.experts.{index}.{leaf}.weight": member for index, member in members}
    return found
