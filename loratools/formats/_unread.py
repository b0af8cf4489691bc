"""An alpha that a trainer put into the header under a word of its own, where readers of the format do not look.

SimpleTuner, ACE-Step and LightX2V write one; ComfyUI and diffusers then scale by 1 (ComfyUI issue 12191, SGLang issue 36082).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from loratools.errors import AmbiguousError
from loratools.formats._module import Slots

WORDS = ("alpha", "lora_alpha", "network_alpha")


def check_unread(metadata: Mapping[str, str], modules: Mapping[str, Slots], given: float | None) -> None:
    """Raise AmbiguousError where the metadata tells another scale than the 1 that modules without an alpha of their own would get."""
    told = {word: metadata[word] for word in WORDS if word in metadata}
    downs = [slots.refs.get("lora_down.weight") for slots in modules.values() if "alpha" not in slots]
    ranks = {ref.spec.shape[0] for ref in downs if ref is not None and ref.spec.shape}
    if given is not None or all({_number(value)} == ranks for value in told.values()) or not ranks:
        return
    fact = "an alpha in the metadata under a word that this format's readers pass over: they scale by 1"
    found = ", ".join(f"{word} {value[:20]}" for word, value in told.items())
    expected = f"the rank, {', '.join(map(str, sorted(ranks)))}, or an alpha beside each module"
    remedy = "give the alpha it was trained with by --alpha-in A, or its rank for a scale of 1"
    raise AmbiguousError(fact, found=found, expected=expected, remedy=remedy)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
