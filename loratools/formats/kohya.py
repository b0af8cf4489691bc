"""kohya and LyCORIS: one safetensors file, module paths with underscores for dots, `lora_unet_…`, `lora_te1_…`, and a suffix.

`lora_unet_mid_block_attentions_0_proj_in.lora_down.weight` (r, in, *kernel), `.lora_up.weight` (out, r, 1…), `.alpha` (); LyCORIS puts
other suffixes in their place (`_slots`). Each module has its own rank and alpha. Read from sd-scripts `networks/lora*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.adapter import Adapter
from loratools.errors import FormatError, LoratoolsError, raise_all
from loratools.flatnames import split_prefix
from loratools.formats._slots import collect, made
from loratools.formats.base import Container, ReadOptions
from loratools.tensorfile import Ref

NAME = "kohya"
_FLATTENED = re.compile(r"_(lora_(?:down|up|mid)\.weight)$")  # some converters flattened the suffix too
_PASSENGER = re.compile(r"(?:bundle_emb\.|emb_params$|<)")  # textual inversions that ride along


def detect(container: Container) -> bool:
    """Whether its tensors' names begin as this family's do and hold no dot before the suffix."""
    return container.config is None and any(_module(key) for key in container.tensors)


def _module(key: str) -> str | None:
    head = _FLATTENED.sub(r".\1", key).partition(".")[0]
    return head if split_prefix(head) is not None and "." in key else None


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in a kohya or LyCORIS file, under its flat names; textual inversions ride along as passengers.

    Raises FormatError for tensors that belong to no module of a known kind, AmbiguousError for an alpha of 0 and for a flat
    magnitude of a square weight.
    """
    options = options or ReadOptions()
    passengers = {key: ref for key, ref in container.tensors.items() if _PASSENGER.match(key)}
    spelt = {_FLATTENED.sub(r".\1", key): ref for key, ref in container.tensors.items() if key not in passengers}
    try:
        modules, others = collect(spelt)
        deltas, faults = made(modules, lambda module, slots: options.alpha)
        faults += _strays(others, modules)
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(
        deltas, {"safetensors": dict(container.metadata)}, passengers, container.path, NAME, container.files, flat=True,
    )  # fmt: skip


def _strays(others: Mapping[str, Ref], modules: Mapping[str, object]) -> list[LoratoolsError]:
    faults: list[LoratoolsError] = [FormatError("no tensor of this family", tensor=key) for key in others]
    strange = [name for name in modules if split_prefix(name) is None]
    return faults + [FormatError("a name that begins as none of this family", tensor=name) for name in strange]
