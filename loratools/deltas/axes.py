"""Which axis of a fused stack of experts A reads, by the version of peft that wrote it and the type of the model.

Read from peft's `tuners/lora/layer.py::ParamWrapper` of 0.17.0 to 0.21.2: 0.17 and 0.18 take the first of a matrix's two axes as `in`,
0.19.0 the second of models that say their experts are stored (in, out) (`is_transposed`), later ones the second of all others.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from loratools.families import TURNED_EXPERTS


def turned_by(version: str | None, types: Collection[str]) -> bool | None:
    """Whether A reads the first of the two axes, so that the transpose of B·A is added.

    None for versions before a release that changed it, none at all, and models of unknown type where the type decides.

    >>> turned_by("0.18.1", []), turned_by("0.21.2", ["mixtral"]), turned_by("0.21.2", ["gpt_oss"]), turned_by(None, ["mixtral"])
    (True, False, True, None)
    """
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(.*)", version or "")
    if match is None:
        return None
    release = tuple(int(number or 0) for number in match.groups()[:3])
    if release < (0, 17, 0) or (match[4] and release in ((0, 19, 0), (0, 19, 1))):
        return None
    if release < (0, 19, 0):
        return True
    if not types:
        return None
    stored = any(kind in TURNED_EXPERTS for kind in types)
    return not stored if release == (0, 19, 0) else stored


def required(version: str | None, types: Collection[str]) -> bool | None:
    """The same where no other is possible: transformers 4 did not say which models store their experts (in, out).

    >>> required("0.18.1", ["gpt_oss"]), required("0.21.2", ["mixtral"]), required("0.21.2", ["gpt_oss"])
    (True, False, None)
    """
    usual = turned_by(version, types)
    return usual if usual == turned_by(version, ["of another type"] if types else []) else None
