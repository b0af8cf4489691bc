"""A file that torch.save wrote: its tensors by name, mapped rather than read; nothing in it is run.

`torch.load(weights_only=True)` unpickles tensors and plain containers, and refuses all else. Files since torch 1.6 are zip
archives of uncompressed records, which can be mapped; older ones are read whole. The layouts of the dictionary are those that
trainers write: the tensors themselves, or beneath one key (Lightning, timm, DeepSpeed).
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from loratools.errors import FormatError, LoratoolsError, UnsupportedError, raise_all
from loratools.refs import BLOCK_BYTES, Buffer, Ref, Spec
from loratools.source.handles import check_on_disk
from loratools.tensorfile import WeightFile
from loratools.tensors import code_of, tensor_bytes, to_ref

if TYPE_CHECKING:
    from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WRAPPERS = ("state_dict", "model", "module")


class TorchFile(WeightFile):
    """A torch pickle of tensors by name, in the order it has them.

    `mapped` tells whether the file is mapped or had to be read whole, `beside` the keys that lie beside the dictionary of
    tensors, `aliases` the sets of names under which it holds one and the same tensor; with `lists` a list of pairs of matrices is
    read too, under "0", "1", …; from a `stream`, which lies within the file at `path`, it is read whole. Raises FormatError, naming
    the file, for what torch cannot read, for a pickle of more than tensors, and for tensors that a safetensors file cannot hold.
    """

    def __init__(self, path: str | Path, *, lists: bool = False, stream: IO[bytes] | None = None) -> None:
        self.path = Path(path)
        check_on_disk(self.path)
        table, self.mapped = _load(self.path, stream)
        table, self.beside = _unwrapped(table)
        if lists and _is_pairs(table):
            table = {str(place): tensor for place, tensor in enumerate(table)}
        if not isinstance(table, dict) or not table:
            raise FormatError("not a dictionary of tensors", file=self.path, found=type(table).__name__ if table != {} else "an empty one")
        if "string_to_param" in table:  # AUTOMATIC1111's
            remedy = "load it into the text encoder, as diffusers' load_textual_inversion does"
            fact = "a textual inversion: embeddings of tokens, which change no weight of a model"
            raise UnsupportedError(fact, file=self.path, found=table.get("name"), remedy=remedy)
        refs: dict[str, Ref] = {}
        faults: list[LoratoolsError] = []
        groups: dict[Any, list[str]] = {}
        for name, tensor in table.items():
            try:
                refs[name] = _ref(name, tensor)
                groups.setdefault(_place(tensor) if tensor.numel() else name, []).append(name)
            except FormatError as error:
                faults.append(error.at(file=self.path, tensor=str(name)))
        raise_all(faults)
        super().__init__(self.path, self.path.stat().st_size, refs, {"format": "pt"})
        self.aliases = tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _load(path: Path, within: IO[bytes] | None = None) -> tuple[Any, bool]:
    """What the pickle holds, and whether its tensors are mapped."""
    import torch

    try:
        if not path.is_file():  # a pipe would wait for its writer
            raise FileNotFoundError
        with path.open("rb") as stream:
            zipped = within is None and stream.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings(action="ignore"):
            if within is not None:
                return torch.load(within, map_location="cpu", weights_only=True), False
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped), zipped
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        fact = "the pickle holds more than tensors" if named else "not a torch file, or one that holds more than tensors"
        raise FormatError(f"{fact}; nothing in it was run", file=path, found=named and named[1]) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, IndexError, TypeError) as error:
        if "TorchScript" in str(error):
            raise FormatError("a TorchScript program, not a dictionary of tensors", file=path) from None
        raise FormatError(f"not a torch file, or truncated ({type(error).__name__})", file=path) from None


def _unwrapped(table: Any) -> tuple[Any, tuple[str, ...]]:
    """The dictionary of tensors, and the keys beside it where it lies beneath one of its own."""
    inner = next((key for key in WRAPPERS if isinstance(table, dict) and isinstance(table.get(key), dict)), None)
    if inner is None:
        return table, ()
    return table[inner], tuple(str(key) for key in table if key != inner)


def _is_pairs(table: Any) -> bool:
    """Whether it is a list of an even number of tensors, each of two axes or more."""
    import torch

    return isinstance(table, list) and len(table) % 2 == 0 and all(isinstance(one, torch.Tensor) and one.ndim >= 2 for one in table)


def _ref(name: Any, tensor: Any) -> Ref:
    import torch

    if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
        raise FormatError("not a tensor under a name", found=type(tensor).__name__)
    if tensor.is_meta:
        raise FormatError("a tensor without its data, as a model has it that was never loaded", found="device meta")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or code_of(tensor.dtype) is None:
        found = "nested" if tensor.is_nested else str(tensor.dtype if tensor.layout == torch.strided else tensor.layout)
        raise FormatError("a tensor that safetensors cannot hold", found=found.removeprefix("torch."))
    plain = tensor.detach().resolve_conj().resolve_neg()
    return to_ref(plain) if plain.is_contiguous() else Strided(plain)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What is equal for two names of one tensor."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class Strided(Ref):
    """A tensor whose rows do not follow each other in memory: laid out anew a few rows at a time."""

    def __init__(self, tensor: Tensor, spec: Spec | None = None) -> None:
        code = code_of(tensor.dtype)
        assert code is not None
        self.tensor, self.spec = tensor, spec or Spec(code, tuple(tensor.shape))

    def rows(self, start: int, stop: int) -> Buffer:
        return tensor_bytes(self.tensor[start:stop].contiguous())

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[Buffer]:
        step = max(1, size // max(1, self.spec.row_bytes()))
        for start in range(0, self.spec.shape[0], step):
            yield self.rows(start, min(start + step, self.spec.shape[0]))

    def reshape(self, *shape: int) -> Ref:
        if shape[:1] == self.spec.shape[:1]:  # the same rows
            return Strided(self.tensor, replace(self.spec, shape=shape))
        return to_ref(self.tensor).reshape(*shape)

    def as_bytes(self) -> Ref:
        return to_ref(self.tensor).as_bytes()
