"""MLX-LM's names of stacked experts, `mlp.switch_mlp.gate_proj`, as those that a checkpoint of transformers has of each expert.

The inverse of `sanitize` in mlx_lm/models/*.py, which stacks `mlp.experts.E.gate_proj`, and mixtral's `block_sparse_moe.experts.E.w1`;
some of its models keep the stack as `mlp.experts.gate_proj`, and Nemotron-H's experts, which have no gate, as `fc1` and `fc2`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.full import Replacement
from loratools.sliced import Sliced

_STACK = re.compile(r"(?P<root>(?:.+\.)?(?P<place>\w+))\.(?:switch_mlp|experts)\.(?P<leaf>gate_proj|up_proj|down_proj|fc1|fc2)\.weight")
_WORDS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_PLAIN = {"fc1": "up_proj", "fc2": "down_proj"}


def unswitched(deltas: Mapping[str, Delta], base: Collection[str]) -> Mapping[str, Delta]:
    """The deltas with those of MLX's stacks as one for each expert, where the base has no such stacks itself.

    >>> list(unswitched({"a.mlp.switch_mlp.up_proj.weight": Stacked(members=(None, None))}, ["a.mlp.switch_mlp.up_proj.weight"]))
    ['a.mlp.switch_mlp.up_proj.weight']
    """
    if any(".switch_mlp." in name for name in base):
        return deltas
    found: dict[str, Delta] = {}
    for name, delta in deltas.items():
        match = _STACK.fullmatch(name) if name not in base else None
        members = _members(delta) if match else ()
        if match is None or not members:
            found[name] = delta
            continue
        leaf = _PLAIN.get(match["leaf"], match["leaf"])
        leaf = _WORDS[leaf] if match["place"] == "block_sparse_moe" else leaf
        found |= {f"{match['root']}.experts.{index}.{leaf}.weight": member for index, member in enumerate(members) if member is not None}
    return found


def _members(delta: Delta) -> Sequence[Delta | None]:
    """The changes of each expert, where the delta is that of a stack: of one saved whole, as "full" fine-tuning saves it, its matrices."""
    if isinstance(delta, Stacked):
        return delta.members
    if not isinstance(delta, Replacement) or len(delta.value.spec.shape) != 3:
        return ()
    count, height, width = delta.value.spec.shape
    rows = delta.value.reshape(count * height, width)
    return [Replacement(value=Sliced(rows, slice(index * height, (index + 1) * height))) for index in range(count)]
