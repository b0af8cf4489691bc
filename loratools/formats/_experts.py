"""LoRA of fused experts as that of each expert's own matrices, for formats that name these or stack them in another way.

transformers fuses the gate's rows above those of the way up, `experts.gate_up_proj` (experts, 2·width, in), in the models whose row of its
table says so (`layouts.transformers`); of the others, whose rows alternate or which store (in, out), a stack stays what it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from loratools.deltas.base import Delta
from loratools.deltas.experts import Experts
from loratools.layouts.transformers import table

_FUSED = re.compile(r"(?P<root>.+\.experts)\.(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj)")


def apart(deltas: Mapping[str, Delta], types: Iterable[str]) -> dict[str, Delta]:
    """The deltas, those of fused experts of models of these types as `ROOT.NUMBER.gate_proj.weight` and so on; slices, no arithmetic."""
    found: dict[str, Delta] = {}
    known = any(one_above_the_other(kind) for kind in types)
    for name, delta in deltas.items():
        match = _FUSED.fullmatch(name) if known and isinstance(delta, Experts) else None
        if match is None or not isinstance(delta, Experts):
            found[name] = delta
            continue
        height = delta.shape()[1]
        halves = {"gate_proj": slice(0, height // 2), "up_proj": slice(height // 2, height)}
        places = halves if match["leaf"] == "gate_up_proj" else {match["leaf"]: slice(0, height)}
        for leaf, rows in places.items():
            found |= {f"{match['root']}.{index}.{leaf}.weight": delta.expert(index, rows) for index in range(delta.experts)}
    return found


def one_above_the_other(kind: str) -> bool:
    """Whether a model's type fuses the gate's rows above those of the way up, (out, in) each.

    >>> one_above_the_other("qwen3_moe"), one_above_the_other("gpt_oss")
    (True, False)
    """
    rows = table().rules.get(kind, ())
    return any(row[0] == "experts" and len(row[1].split()) == 2 and row[-1].endswith("gate_up_proj") for row in rows)
