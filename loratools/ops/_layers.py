"""Where a module stands in a model: which layer, and which of the modules that each layer has."""

from __future__ import annotations

import re
from typing import NamedTuple

_FLAT = re.compile(r"(?<=_)(\d+)(?=_)")  # a number in a name without dots, as some formats flatten them


class Place(NamedTuple):
    """`stack` and `number` of the layer (None outside all layers), and the module's name within it."""

    stack: str
    number: int | None
    module: str

    @property
    def layer(self) -> str | None:
        """The layer's own name."""
        return None if self.number is None else f"{self.stack}.{self.number}"


def place_of(name: str) -> Place:
    """The layer is the first number in a tensor's name, with what stands before it.

    >>> place_of("model.layers.3.self_attn.q_proj.weight")
    Place(stack='model.layers', number=3, module='self_attn.q_proj')
    >>> place_of("lm_head.weight").layer, place_of("lora_unet_down_blocks_1_conv").module
    (None, 'conv')
    """
    parts = name.removesuffix(".weight").split(".")
    at = next((index for index, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    if at:
        return Place(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))
    found = _FLAT.search(name) if len(parts) == 1 else None
    if found:
        return Place(name[: found.start() - 1], int(found[0]), name[found.end() + 1 :])
    return Place("", None, ".".join(parts))
