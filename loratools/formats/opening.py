"""An adapter's file or folder opened: which file of a folder is read, what else lies beside it, headers alone where that is enough."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from loratools.errors import FormatError, UnsupportedError
from loratools.formats._archive import read_archive, refuse_ranks
from loratools.formats._sides import SideFiles
from loratools.formats.base import CONFIG, WEIGHTS, Container, nearest
from loratools.gguffile import GGUFFile, is_gguf
from loratools.jsonfile import read_json
from loratools.needed import RECEIPT
from loratools.refs import Ref, Spec
from loratools.source import local
from loratools.tensorfile import TensorFile
from loratools.torchfile import PICKLES, TorchFile

LITGPT = ".pth.lora"
ARRAYS = ("model.lora_weights.npy", "model.lora_config.npy")  # of TensorRT-LLM
SIDES = ("config.json", "hyperparameters.yaml", "model_config.yaml", "run_config.yaml")  # which trainers leave beside
# in the order in which a folder's are read: peft's file that torchtune writes beside its own is another change, for some models
_ORDER = ("adapter_model.pt", "adapter_0.pt", *(name for name in WEIGHTS if name not in ("adapter_model.pt", "adapter_0.pt")))


def open_container(path: str | Path) -> Container:
    """The adapter's files, from a folder or the file of its weights, or of a repository on the Hub; headers only, unless it is a pickle.

    Raises FormatError for what is no adapter, a header that lies, or a pickle that holds more than tensors, and what `source.local` raises.
    """
    path = local(path, of_adapter)
    if not path.exists():
        raise FormatError("no such file or folder", file=path)
    if path.name in ARRAYS:
        raise _arrays(path)
    weights, notes = (_weights_in(path), _passed_over(path)) if path.is_dir() else (path, ())
    beside = weights.parent / CONFIG
    config = read_json(beside, once=True) if beside.is_file() else None
    files = (weights, beside) if config is not None else (weights,)
    sides = SideFiles(weights.parent, SIDES)
    if weights.suffix in PICKLES or weights.name.endswith(LITGPT):
        table = TorchFile(weights, lists=True)  # loaded with weights_only, so that no code in it runs
        notes += (f"left out of {weights.name}: {nearest(table.beside)}, which lies beside its tensors",) if table.beside else ()
        return Container(dict(table), {}, config, weights, files, beside=sides, notes=notes)
    if weights.suffix == ".nemo":
        tensors, beside_them = read_archive(weights)
        return Container(tensors, {}, None, weights, (weights,), beside=beside_them)
    if weights.suffix == ".npz":
        return Container(load_npz(weights), {}, config, weights, files, notes=notes)
    if weights.suffix == ".gguf" or is_gguf(weights):
        found = GGUFFile(weights)
        return Container(found, {}, None, weights, (weights,), fields=found.fields)
    opened = TensorFile(weights)
    return Container(opened, opened.metadata, config, weights, files, opened.header_sha256, beside=sides, notes=notes)


def of_adapter(path: Path) -> list[Path]:
    """An adapter's files, and the receipt that may lie with it: those that are downloaded of a repository."""
    weights = _weights_in(path) if path.is_dir() else path
    names = (CONFIG, RECEIPT, f"{weights.name}.{RECEIPT}")
    return [weights, *(file for name in names if (file := weights.parent / name).is_file() and file != weights)]


def is_adapter(folder: Path) -> bool:
    """Whether a folder is to be read as an adapter rather than as a model: it has an adapter's config, or weights by an adapter's name."""
    named = any((folder / name).is_file() for name in (*WEIGHTS, ARRAYS[0])) and not (folder / "model_index.json").is_file()
    return named or (folder / CONFIG).is_file() or any(folder.glob("adapter_model.*"))


def _arrays(path: Path) -> UnsupportedError:
    fact = "TensorRT-LLM's LoRA, which names no tensors and is written, not read"
    return UnsupportedError(fact, file=path, remedy="give the adapter it was made of")


def _weights_in(folder: Path) -> Path:
    if (folder / ARRAYS[0]).is_file():
        raise _arrays(folder)
    found = [folder / name for name in _ORDER if (folder / name).is_file()]
    if not found:
        refuse_ranks(folder, [str(path.relative_to(folder)) for path in (*folder.glob("*/model_weights.ckpt"), *folder.glob("*.distcp"))])
    if found:
        return found[0]
    inner = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("*/" + CONFIG))
    if inner:
        raise FormatError(
            "holds adapters in folders of their own", file=folder, found=", ".join(inner[:4]), remedy="name one of them as the path"
        )
    if (folder / "adapter_model.safetensors.index.json").is_file():
        raise FormatError("a sharded adapter, which peft does not read either", file=folder, remedy="save it in one file")
    expected = " or ".join(WEIGHTS[:3])
    named = sorted(file.name for file in folder.iterdir() if file.suffix in (*PICKLES, ".safetensors", ".gguf", ".npz", ".nemo"))
    remedy = f"is it a model rather than an adapter? An adapter in a file of another name is given by it, {named[0]}" if named else None
    raise FormatError("no adapter in it", file=folder, expected=expected, remedy=remedy)


def _passed_over(folder: Path) -> tuple[str, ...]:
    """A note where a folder holds files of several adapters, or of one adapter twice: the first in that order is read."""
    found = [name for name in _ORDER if (folder / name).is_file()]
    return (f"read from {found[0]}, not from {', '.join(found[1:])} beside it: name that file to have it",) if len(found) > 1 else ()


def load_npz(path: Path) -> dict[str, Ref]:
    """numpy's archive of arrays by name, as MLX wrote until 2024; no pickled objects. Raises FormatError."""
    import numpy as np

    from loratools.refs import InMemory

    codes = {"float32": "F32", "float16": "F16", "float64": "F64", "int32": "I32", "int64": "I64", "uint32": "U32"}
    try:
        with np.load(path, allow_pickle=False) as table:
            arrays = {name: np.ascontiguousarray(table[name]) for name in table.files}
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"not an archive of arrays ({type(error).__name__})", file=path) from None
    for name, array in arrays.items():
        if array.dtype.name not in codes:
            raise FormatError("an array of a dtype that is not read", file=path, tensor=name, found=array.dtype.name)
    return {name: InMemory(Spec(codes[array.dtype.name], array.shape), array.tobytes()) for name, array in arrays.items()}
