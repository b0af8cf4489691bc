"""What a codec sees of a file or folder, and what it hands back: tensors, metadata, config. No codec opens a file itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import UsageError
from loratools.formats._digests import Seal
from loratools.formats._sides import SideFiles
from loratools.refs import Ref

CONFIG = "adapter_config.json"
WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "adapters.npz", "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin", "adapter_model.pt", "adapter_0.pt", "lit_model.pth.lora", "model_weights.ckpt",
)  # fmt: skip


@dataclass(frozen=True)
class Container:
    """An adapter as its files hold it: `tensors` by key, the safetensors `metadata`, the JSON `config` beside them.

    `name` is what a folder's file of weights is called where it is written. `fields` are the typed values in the header of a file that
    has such (GGUF). `beside` are the tables of other files beside it, by name. `writer` writes the container to a path and
    returns each tensor's digest, where it is not safetensors. `seal` are the digests in the metadata that only the tensors' bytes tell.
    `notes` are what a person should be told of the writing, or of what else was found where it was read.
    """

    tensors: Mapping[str, Ref]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    path: Path | None = None
    files: tuple[Path, ...] = ()
    header_sha256: str | None = None
    name: str = WEIGHTS[0]
    fields: Mapping[str, Any] = field(default_factory=dict)
    writer: Callable[[Container, Path], dict[str, str]] | None = None
    seal: Seal | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def stated(self) -> dict[str, str]:
        """The metadata that is written, digests that are not taken yet as zeros."""
        return {**self.metadata, **(self.seal.blank if self.seal else {})}

    def used(self, *names: str) -> tuple[Path, ...]:
        """The files `beside` of those names, as far as they were read."""
        read = self.beside.read if isinstance(self.beside, SideFiles) else {}
        return tuple(read[name] for name in names if name in read)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a user adds where a file does not say enough.

    `format` is the one to read it in, where several claim it. `scale` ("alpha" or "alpha/r") and `scratch_dora` ("merged" or "output")
    are for the tutorials' files, `enable_lora` (the slots of a MergedLinear) and `kernels` (globs over modules with the kernel of their
    convolution) for loralib's, the former for litgpt's q, k and v too, `initial` (the path of the adapter as it was initialised) for
    peft's whose initialisation changed the base.
    """

    format: str | None = None
    alpha: float | None = None
    embeddings: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    scale: str | None = None
    scratch_dora: str | None = None
    enable_lora: tuple[bool, ...] | None = None
    kernels: tuple[tuple[str, int], ...] = ()
    initial: str | None = None


def read_options(words: Mapping[str, Any]) -> ReadOptions:
    """The options from the words that commands and receipts use; a word that is missing was not given.

    >>> read_options({"alpha_in": 16, "enable_lora": "1,0,1"}).enable_lora
    (True, False, True)
    """
    slots = words.get("enable_lora")
    if slots is not None and not all(slot in ("0", "1") for slot in slots.split(",")):
        raise UsageError("--enable-lora", found=slots, expected="a 1 or 0 for each slot, such as 1,0,1")
    alpha = words.get("alpha_in")
    if alpha is not None and not math.isfinite(alpha):
        raise UsageError("--alpha-in", found=alpha, expected="a finite number")
    for word, known in (("scale", ("alpha", "alpha/r")), ("scratch_dora", ("merged", "output"))):
        if words.get(word) not in (None, *known):
            raise UsageError(f"--{word.replace('_', '-')}", found=words[word], expected=" or ".join(known))
    return ReadOptions(
        format=words.get("from_format"),
        alpha=alpha,
        embeddings=tuple(words.get("embedding") or ()),
        transposed=tuple(words.get("transposed") or ()),
        scale=words.get("scale"),
        scratch_dora=words.get("scratch_dora"),
        enable_lora=None if slots is None else tuple(slot == "1" for slot in slots.split(",")),
        kernels=tuple(_kernel(text) for text in words.get("conv") or ()),
        initial=None if words.get("initial") is None else str(words["initial"]),
    )


def _kernel(text: str) -> tuple[str, int]:
    glob, _, size = text.rpartition("=")
    if not glob or not size.isdigit() or int(size) < 1:
        raise UsageError("--conv", found=text, expected="GLOB=K, K the size of the kernel")
    return glob, int(size)


def nearest(keys: Iterable[str], count: int = 3) -> str:
    """The first keys of a file, for a message."""
    shown = list(keys)
    return ", ".join(shown[:count]) + (f", … ({len(shown)} in all)" if len(shown) > count else "")
