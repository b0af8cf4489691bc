"""The keys of peft's LoRA: a module's path, a marker, and an adapter's name or a leaf behind it.

    .lora_A.weight  .lora_B.weight  .lora_B.bias  .lora_embedding_A  .lora_embedding_B  .lora_magnitude_vector
    .lora_diag  .lora_velora_embed  .lora_monteclora_sampler.LEAF  .token_adapter.trainable_tokens_delta

Saved files have no adapter's name, live state dicts have it directly behind the marker.
"""

from __future__ import annotations

import re

from loratools.errors import FormatError
from loratools.formats.peft_keys import Key
from loratools.formats.peft_tokens import MARKER, SLOT
from loratools.formats.peft_variants import SAMPLER, SAMPLES

_MARKERS = {
    "lora_A": ("weight",), "lora_B": ("weight", "bias"), "lora_embedding_A": (None,), "lora_embedding_B": (None,),
    "lora_magnitude_vector": (None, "weight"), "lora_diag": (None,), "lora_velora_embed": (None,), SAMPLER: SAMPLES, MARKER: (None,),
}  # fmt: skip
_ENDS = "|".join(("weight", "bias", *SAMPLES))
_KEY = re.compile(
    rf"(?P<module>.+?)\.(?P<marker>{'|'.join(map(re.escape, _MARKERS))})(?:\.(?P<adapter>(?!(?:{_ENDS})$)[^.]+))?(?:\.(?P<leaf>{_ENDS}))?"
)


def lora_key(path: str) -> Key | None:
    """What a key of a LoRA says, its prefix taken off; None for any other tensor's. Raises FormatError for what peft never writes."""
    match = _KEY.fullmatch(path)
    if match is None:
        return None
    marker, leaf = match["marker"], match["leaf"]
    if leaf not in _MARKERS[marker]:
        expected = " or ".join(f"{marker}.{name}" if name else marker for name in _MARKERS[marker])
        raise FormatError("not a key peft writes", expected=expected)
    slot = {"lora_B": "bias" if leaf == "bias" else marker, SAMPLER: f"{SAMPLER}.{leaf}", MARKER: SLOT}.get(marker, marker)
    return Key(match["module"], slot, match["adapter"])
