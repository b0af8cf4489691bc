"""A file that torch reads with `torch.load`: tensors by name, beneath one key or not, with what lies beside them in the folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from loratools.errors import LoratoolsError, OptionError
from loratools.formats.base import Container

if TYPE_CHECKING:
    from torch import Tensor


def folder_of(name: str, *, within: str | None = None, beside: Callable[[Path], None]) -> Callable[[Container, Path], dict[str, str]]:
    """A writer of a folder that holds a container's tensors as the pickle `name`, and what `beside` writes into it."""

    def write(container: Container, folder: Path) -> dict[str, str]:
        if folder.suffix in (".safetensors", ".pt", ".pth"):
            expected = "OUT without an ending, for a folder"
            raise OptionError("this format is a folder of weights and a config", found=folder.name, expected=expected)
        folder.mkdir(exist_ok=True)
        table, digests = loaded(container)
        save({within: table} if within else table, folder / name)
        beside(folder)
        return digests

    return write


def loaded(container: Container) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a container, which a pickle needs at once, and the digest of each."""
    from loratools.tensors import read_tensor, tensor_bytes

    table: dict[str, Tensor] = {}
    for name, ref in container.tensors.items():
        try:
            table[name] = read_tensor(ref)
        except LoratoolsError as error:
            raise error.at(tensor=name) from None
    return table, {name: blake3(tensor_bytes(tensor)).hexdigest() for name, tensor in table.items()}


def save(table: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, the same bytes wherever the file lies: torch names the archive within after the file unless it is a stream."""
    import torch

    with path.open("xb") as stream:
        torch.save(dict(table), stream)
