"""The table of peft's methods: a row for each that edits weights, a reason for each that does not or does not tell how.

A new method is a delta of its own in `deltas/` and one row in the file of its kind.
"""

from __future__ import annotations

from loratools.errors import FormatError, UnsupportedError
from loratools.formats.peft_additive import ADDITIVE
from loratools.formats.peft_banked import BANKED
from loratools.formats.peft_decomposed import DECOMPOSED
from loratools.formats.peft_method import Method
from loratools.formats.peft_multiplicative import MULTIPLICATIVE
from loratools.formats.peft_placed import PLACED
from loratools.formats.peft_projections import PROJECTIONS
from loratools.formats.peft_rotations import ROTATIONS

METHODS = {row.peft_type: row for row in (*ADDITIVE, *BANKED, *DECOMPOSED, *MULTIPLICATIVE, *PLACED, *PROJECTIONS, *ROTATIONS)}
_PROMPT = "trains virtual tokens or states in front of the input: no weight edit"
NOT_WEIGHTS = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "adds gated attention to learned prompts: no weight edit",
    "XLORA": "mixes several LoRAs by a gate that sees the input: no weight edit",
    "POLY": "mixes LoRA skills by a task's routing: no weight edit",
    "LILY": "mixes shared LoRA experts by a router that sees the input: no weight edit",
    "SHADOW": "runs a second network beside the layers: no weight edit",
}
NOT_TOLD = {
    "ADAMSS": "which rows of a weight each of its subspaces changes is not in the file: peft clusters the base's singular vectors again "
    "(scikit-learn's k-means), and nothing tells whether that finds the rows it was trained with",
    "PSOFT": "it turns the base's leading singular vectors into one another, and what it makes of them depends on their signs, "
    "which another machine chooses otherwise and the adapter does not save",
}
GONE = {"BONE": "peft replaced it by MISS in 0.17 and no longer reads it: convert it with the peft that wrote it"}


def method_of(peft_type: str) -> Method:
    """The row of a `peft_type`.

    Raises UnsupportedError for methods that edit no weight, or whose files do not tell how, FormatError for what peft has not.
    """
    if peft_type in METHODS:
        return METHODS[peft_type]
    if peft_type in NOT_WEIGHTS:
        raise UnsupportedError(f"peft's {peft_type} {NOT_WEIGHTS[peft_type]}", remedy="serve it with peft")
    if peft_type in NOT_TOLD:
        remedy = "merge it with peft where it was trained (merge_and_unload), and take the change from that with loratools extract"
        raise UnsupportedError(f"peft's {peft_type}: {NOT_TOLD[peft_type]}", remedy=remedy)
    if peft_type in GONE:
        raise UnsupportedError(f"peft's {peft_type}: {GONE[peft_type]}")
    raise FormatError("peft_type is none that is known", found=peft_type, expected=", ".join(sorted({"LORA", *METHODS})))
