"""The order of parameters is that of every module of the installed transformers."""

from __future__ import annotations

import re
from pathlib import Path

import transformers

from loratools.deltas.registered import REGISTERED, as_registered, in_registered_order


def test_the_order_of_registration_is_transformers_own() -> None:
    """Every module that registers several of these does so in this order."""
    seen = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for body in re.split(r"^class ", path.read_text(), flags=re.MULTILINE):
            known = [name for name in re.findall(r"self\.(\w+) = nn\.Parameter\(", body) if name in REGISTERED]
            assert known == in_registered_order(known) and as_registered(known), (path.name, body[:40], known)
            seen |= set(known) if len(known) > 1 else set()
    assert seen == set(REGISTERED)


def test_what_is_not_known_may_be_anywhere() -> None:
    assert in_registered_order(["x", "m.down_proj", "m.gate_up_proj"]) == ["m.gate_up_proj", "m.down_proj", "x"]
    assert as_registered(["m.x", "m.gate_up_proj", "y", "m.down_proj_bias"]) and not as_registered(["m.down_proj", "x", "m.up_proj"])
