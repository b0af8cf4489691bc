"""Formats: each a pair of pure functions between an `Adapter` and the tensors on disk, found by what is in the file.

A format is one file with NAME, `detect` and `decode` (and an `encode` where it can be written), and one row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.errors import FormatError, LoratoolsError, NotExpressible, OptionError, UnsupportedError, UsageError
from loratools.formats import (
    cloneofsimo,
    cloneofsimo_encode,
    comfyui,
    diffusers,
    diffusers_encode,
    gguf,
    gguf_encode,
    kohya,
    litgpt,
    loralib,
    mlx,
    native,
    nemo,
    nemo_encode,
    peft,
    peft_encode,
    samlora,
    samlora_encode,
    scratch,
    torchtune,
    trtllm,
    xlabs,
)
from loratools.formats._marks import NEEDS, inversions, near, shown
from loratools.formats.base import Container, ReadOptions, nearest
from loratools.formats.opening import open_container
from loratools.formats.writing import write_container


@dataclass(frozen=True)
class Format:
    """A row of the table: how a format is recognised, read and written."""

    name: str
    detect: Callable[[Container], bool]
    decode: Callable[[Container, ReadOptions], Adapter]
    encode: Callable[[Adapter], Container] | None = None


FORMATS = (
    Format(peft.NAME, peft.detect, peft.decode, peft_encode.encode),
    Format(loralib.NAME, loralib.detect, loralib.decode, loralib.encode),
    Format(kohya.NAME, kohya.detect, kohya.decode, kohya.encode),
    Format(diffusers.NAME, diffusers.detect, diffusers.decode, diffusers_encode.encode),
    Format(comfyui.NAME, comfyui.detect, comfyui.decode, comfyui.encode),
    Format(mlx.NAME, mlx.detect, mlx.decode, mlx.encode),
    Format(torchtune.NAME, torchtune.detect, torchtune.decode, torchtune.encode),
    Format(litgpt.NAME, litgpt.detect, litgpt.decode, litgpt.encode),
    Format(nemo.NAME, nemo.detect, nemo.decode, nemo_encode.encode),
    Format(trtllm.NAME, trtllm.detect, trtllm.decode, trtllm.encode),
    Format(gguf.NAME, gguf.detect, gguf.decode, gguf_encode.encode),
    Format(scratch.NAME, scratch.detect, scratch.decode, scratch.encode),
    Format(cloneofsimo.NAME, cloneofsimo.detect, cloneofsimo.decode, cloneofsimo_encode.encode),
    Format(samlora.NAME, samlora.detect, samlora.decode, samlora_encode.encode),
    Format(xlabs.NAME, xlabs.detect, xlabs.decode, xlabs.encode),
    Format(native.NAME, native.detect, native.decode, native.encode),
)


def load(path: str | Path, *, format: str | None = None, options: ReadOptions | None = None) -> Adapter:
    """The adapter at a path, in whatever format it is written; headers only.

    Raises FormatError for a file no format claims, naming its first keys, and what the format's own decoder raises.
    """
    container = open_container(path)
    if not container.tensors:
        raise FormatError("no tensors in it", file=container.path)
    options = options or ReadOptions()
    row = _format_of(container, format or options.format)
    if options.initial is not None and row.name != peft.NAME:
        raise OptionError("--initial is for peft's LoRA", file=container.path, found=row.name)
    return _with_notes(row.decode(container, options), container.notes)


def _with_notes(adapter: Adapter, notes: tuple[str, ...]) -> Adapter:
    """The adapter with what was noted where it was read, which one that waits for its base's config has later too."""
    if not notes:
        return adapter
    told = adapter.pending
    pending = None if told is None else lambda config: _with_notes(told(config), notes)
    return replace(adapter, notes=(*adapter.notes, *notes), pending=pending)


def save(adapter: Adapter, out: str | Path, *, format: str = "peft", overwrite: bool = False) -> None:
    """Write an adapter, whole or not at all."""
    from loratools.output import check_output, whole

    target = check_output(out, overwrite=overwrite)
    encoded = encode(adapter, format)
    with whole(target) as place:
        write_container(encoded, place)


def encode(adapter: Adapter, format: str = "peft") -> Container:
    """The adapter as a format's files, nothing written yet. Raises NotExpressible for what the format cannot say."""
    row = next((row for row in FORMATS if row.name == format), None)
    if row is None or row.encode is None:
        raise UsageError("unknown --format", found=format, expected=" or ".join(row.name for row in FORMATS if row.encode))
    if adapter.flat and row.name in _DOTTED and len(adapter):  # a file of passengers alone has no names to spell
        fact = "its names have underscores where the model's have dots, which only the base can tell apart"
        raise NotExpressible(fact, file=adapter.path, found=next(iter(adapter)), remedy="convert --base gives it the model's names")
    counted = next((name for name in adapter if _COUNTED.fullmatch(name)), None) if adapter.numbered is not None else None
    if counted is not None and row.name != adapter.format:
        fact = "its file counts modules instead of naming them, and which this is only the base tells"
        raise NotExpressible(fact, file=adapter.path, tensor=counted, remedy="convert --base gives it the model's names")
    try:
        return row.encode(adapter)
    except LoratoolsError as error:
        raise error.at(file=adapter.path) from None


_COUNTED = re.compile(r"\w+:\d+\.weight")  # a module's place in the order of a file that has no names

# formats whose readers look for a module of the name written, and skip some that they do not find without a word
_DOTTED = (peft.NAME, native.NAME, loralib.NAME, scratch.NAME)


def _format_of(container: Container, name: str | None) -> Format:
    if name is not None:
        row = next((row for row in FORMATS if row.name == name), None)
        if row is None:
            raise UsageError("unknown --from", found=name, expected=" or ".join(row.name for row in FORMATS))
        return row
    if tokens := inversions(container.tensors):
        fact = "a textual inversion: embeddings of tokens, which change no weight of a model"
        remedy = "load it into the text encoder, beside the adapter it came with, as diffusers' load_textual_inversion does"
        raise UnsupportedError(fact, file=container.path, found=nearest(tokens), remedy=remedy)
    found = [row for row in FORMATS if row.detect(container)]
    if len(found) == 1:
        return found[0]
    total, looks = len(container.tensors), near(container.tensors, [row.name for row in FORMATS])
    if found:
        counts = dict(looks)
        claims = [(row.name, counts.get(row.name, 0)) for row in found]
        remedy = "a file is of one format: write each of its adapters to a file of its own"
        if container.config is not None:
            remedy = "does the adapter_config.json beside it belong to it?"
        raise FormatError("several formats claim it", file=container.path, found=shown(claims, total), remedy=remedy)
    keys = nearest(container.tensors)
    if any(".lora_A." in key or ".lora_embedding_A" in key for key in container.tensors):
        remedy = "put its adapter_config.json beside it: without one the scale is unknown; of LoRA, --from peft --alpha-in A tells it"
        raise FormatError(
            "peft tensors without an adapter_config.json that names a peft_type", file=container.path, found=keys, remedy=remedy
        )
    best = looks[:3]
    needs = [f"{name} needs {NEEDS[name]}" for name, _ in best if name in NEEDS]
    remedy = "; ".join([f"nearest {shown(best, total)}", *needs]) if best else "is it a checkpoint, or an adapter of another program?"
    raise UnsupportedError("no format that loratools reads", file=container.path, found=keys, remedy=remedy)
