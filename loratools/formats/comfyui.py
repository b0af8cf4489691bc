"""ComfyUI and BFL: dotted names under `diffusion_model.` or `text_encoders.`, with kohya's, LyCORIS' or peft's suffixes.

Also whole differences `.diff` and `.diff_b`, replacements `.set_weight`. Without an alpha the scale is 1. Read from ComfyUI
`comfy/lora.py` and `comfy/weight_adapter/`.
"""

from __future__ import annotations

from loratools.adapter import Adapter
from loratools.errors import FormatError, LoratoolsError, raise_all
from loratools.formats._slots import SPELLINGS, collect, made
from loratools.formats.base import Container, ReadOptions

NAME = "comfyui"
ROOTS = ("diffusion_model.", "text_encoders.")


def detect(container: Container) -> bool:
    """Whether its modules lie under `diffusion_model.` or `text_encoders.` and end as changes of them do."""
    keys = container.tensors
    return container.config is None and any(key.startswith(ROOTS) and SPELLINGS.fullmatch(key) for key in keys)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter in such a file, under its own dotted names. Raises FormatError for tensors that are part of no change."""
    options = options or ReadOptions()
    try:
        modules, others = collect(container.tensors, SPELLINGS)
        deltas, faults = made(modules, lambda module, slots: options.alpha)
        faults += [FormatError("no tensor of this family", tensor=key) for key in others]
        faults += [FormatError("lies under none of the roots", tensor=name) for name in modules if not name.startswith(ROOTS)]
        raise_all(faults)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(deltas, {"safetensors": dict(container.metadata)}, {}, container.path, NAME, container.files)
