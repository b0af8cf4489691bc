"""Formats: each a pair of pure functions between an `Adapter` and the tensors on disk, found by what is in the file.

A format is one file with NAME, `detect` and `decode` (and an `encode` where it can be written), and one row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter import Adapter
from loratools.errors import FormatError, NotExpressible, OptionError, UnsupportedError, UsageError
from loratools.formats import comfyui, diffusers, diffusers_encode, kohya, loralib, mlx, native, peft, peft_encode, scratch
from loratools.formats.base import Container, ReadOptions, nearest, open_container, write_container


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
    Format(scratch.NAME, scratch.detect, scratch.decode, scratch.encode),
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
    return row.decode(container, options)


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
    if adapter.flat and row.name in _DOTTED:
        fact = "its names have underscores where the model's have dots, which only the base can tell apart"
        raise NotExpressible(fact, file=adapter.path, found=next(iter(adapter)), remedy="convert --base gives it the model's names")
    return row.encode(adapter)


# formats whose readers look for a module of the name written, and skip some that they do not find without a word
_DOTTED = (peft.NAME, native.NAME, loralib.NAME, scratch.NAME)


def _format_of(container: Container, name: str | None) -> Format:
    if name is not None:
        row = next((row for row in FORMATS if row.name == name), None)
        if row is None:
            raise UsageError("unknown --from", found=name, expected=" or ".join(row.name for row in FORMATS))
        return row
    found = [row for row in FORMATS if row.detect(container)]
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError("several formats claim it", file=container.path, found=", ".join(row.name for row in found), remedy="give --from")
    keys = nearest(container.tensors)
    if any(".lora_A" in key or ".lora_embedding_A" in key for key in container.tensors):
        remedy = "put its adapter_config.json beside it: without one the scale is unknown"
        raise FormatError(
            "peft tensors without an adapter_config.json that names a peft_type", file=container.path, found=keys, remedy=remedy
        )
    raise UnsupportedError("no format that loratools reads", file=container.path, found=keys)
