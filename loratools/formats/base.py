"""What a codec sees of a file or folder, and what it hands back: tensors, metadata, config. No codec opens a file itself."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import FormatError, LoratoolsError, OptionError, UnsupportedError, UsageError
from loratools.follower import Follower
from loratools.formats._archive import read_archive, refuse_ranks
from loratools.formats._digests import Seal
from loratools.formats._sides import SideFiles
from loratools.gguffile import GGUFFile, is_gguf
from loratools.header import canonical
from loratools.jsonfile import read_json
from loratools.needed import RECEIPT
from loratools.refs import Buffer, Ref, Spec
from loratools.source import local
from loratools.tensorfile import TensorFile
from loratools.tensorwriter import TensorWriter
from loratools.torchfile import PICKLES, TorchFile

CONFIG = "adapter_config.json"
LITGPT = ".pth.lora"
ARRAYS = ("model.lora_weights.npy", "model.lora_config.npy")  # of TensorRT-LLM
SIDES = ("config.json", "hyperparameters.yaml", "model_config.yaml", "run_config.yaml")  # which trainers leave beside
WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors", "adapters.npz", "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin", "adapter_model.pt", "adapter_0.pt", "lit_model.pth.lora", "model_weights.ckpt",
)  # fmt: skip
# in the order in which a folder's are read: peft's file that torchtune writes beside its own is another change, for some models
_ORDER = ("adapter_model.pt", "adapter_0.pt", *(name for name in WEIGHTS if name not in ("adapter_model.pt", "adapter_0.pt")))


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


def write_container(container: Container, folder: Path) -> dict[str, str]:
    """The container as a folder of `adapter_model.safetensors` and `adapter_config.json`; returns each tensor's digest.

    Without a config it may be a single file: where the name ends in `.safetensors`. A container with a `writer` is written by it.
    The last bytes are not synced: `output.whole` does that before they are seen.
    """
    if container.writer is not None:
        return container.writer(container, folder)
    if container.config is None and folder.suffix == ".safetensors":
        return write_tensors(folder, container)
    if folder.suffix == ".safetensors":
        expected = "OUT without the ending .safetensors"
        raise OptionError("this format is a folder of weights and a config", found=folder.name, expected=expected)
    folder.mkdir(exist_ok=True)
    if container.config is not None:
        (folder / CONFIG).write_text(json.dumps(container.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return write_tensors(folder / container.name, container)


def write_tensors(path: Path, container: Container) -> dict[str, str]:
    """The tensors as one safetensors file, in the library's own order, streamed; the header's digests, if any, are put in last."""
    specs: dict[str, Spec] = canonical({name: ref.spec for name, ref in container.tensors.items()})
    writer = TensorWriter(path, specs, container.stated)
    try:
        if container.seal is None:
            _write_all(writer, container.tensors, lambda block: None)
        else:
            taking = container.seal.begun(specs, container.metadata)
            with Follower(taking.data) as follower:
                _write_all(writer, container.tensors, follower.put)
                follower.finish()
            writer.restate({**container.metadata, **taking.found()})
        writer.close(sync=False)
    finally:
        writer.abandon()
    return writer.digests


def _write_all(writer: TensorWriter, tensors: Mapping[str, Ref], seen: Callable[[Buffer], object]) -> None:
    for name in writer.specs:
        writer.write(name, _blocks(name, tensors[name], seen))


def _blocks(name: str, ref: Ref, seen: Callable[[Buffer], object]) -> Iterator[Buffer]:
    try:
        for block in ref.blocks():
            seen(block)
            yield block
    except LoratoolsError as error:
        raise error.at(tensor=name) from None


def nearest(keys: Iterable[str], count: int = 3) -> str:
    """The first keys of a file, for a message."""
    shown = list(keys)
    return ", ".join(shown[:count]) + (f", … ({len(shown)} in all)" if len(shown) > count else "")
