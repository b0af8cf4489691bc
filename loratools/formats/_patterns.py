"""peft's patterns: settings of single modules, by regular expressions over their paths."""

from __future__ import annotations

import re
from collections.abc import Iterable


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """The first pattern, in the file's order, that fits a module; the module's own name if none (`utils.get_pattern_key`).

    >>> pattern_key(["k_proj", "layers.0.*_proj"], "model.layers.0.self_attn.q_proj")
    'layers.0.*_proj'
    """
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def compiles(pattern: str) -> bool:
    """Whether it is a regular expression as it will be used: flags for the whole have no place in it."""
    try:
        re.compile(f"({pattern})")
    except re.error:
        return False
    return True
