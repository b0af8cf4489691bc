"""Which files of a folder hold a model's weights: one file, or an index with its shards.

The order is transformers' and diffusers': safetensors before torch's pickles, of either the single file before its index,
the plain names before all others. spec/checkpoint.md tells the rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from loratools.errors import AmbiguousError, FormatError, LoratoolsError, UnsupportedError, raise_all
from loratools.jsonfile import read_json
from loratools.sidefiles import RECORD, WEIGHTS

PIPELINE = "model_index.json"
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_PICKLED = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_INDEX = re.compile(r".+\.(safetensors|bin)\.index(\.[\w-]+)?\.json")
_VARIANT = re.compile(r"(?!.*-\d{5}-of-\d{5}\.)(diffusion_pytorch_|pytorch_)?model\.[\w-]+\.(safetensors|bin)")
_SAFETENSORS = re.compile(r".+\.safetensors(\.index(\.[\w-]+)?\.json)?")
_TORCH = re.compile(r".+\.(bin|pt|pth|ckpt)(\.index(\.[\w-]+)?\.json)?")
# what a trainer leaves beside a model and is none
_STATE = re.compile(r"(adapter_model|training_args|optimizer|scheduler|scaler|rng_state|random_states)([._-].*)?")


def is_index(name: str) -> bool:
    """Whether a file's name is that of an index of shards.

    >>> is_index("model.safetensors.index.fp16.json")
    True
    """
    return _INDEX.fullmatch(name) is not None


def as_safetensors(name: str) -> str:
    """The name that a file of torch's, or its index, has as safetensors; that of a safetensors file is its own.

    >>> as_safetensors("pytorch_model-00001-of-00002.bin"), as_safetensors("pytorch_model.bin.index.json")
    ('model-00001-of-00002.safetensors', 'model.safetensors.index.json')
    """
    name = re.sub(r"\.(bin|pt|pth|ckpt)(?=$|\.index\.)", ".safetensors", name)
    return name.removeprefix("pytorch_") if name.startswith("pytorch_model") else name


def model_file(path: Path) -> str:
    """The name of the one file, weights or index, that the model at `path` is opened by.

    Raises FormatError for what is no model, AmbiguousError for several, UnsupportedError for one of other kinds of files alone.
    """
    if not path.exists():
        raise FormatError("no such file or folder", file=path)
    if path.is_file():
        return path.name
    if not path.is_dir():
        raise FormatError("neither a file nor a folder", file=path)
    found = _models(path)
    if len(found) == 1:
        return found[0]
    raise _unclear(path, found)


def holds_model(folder: Path) -> bool:
    """Whether a folder has weights of a kind that can be opened."""
    return folder.is_dir() and bool(_models(folder))


def _models(folder: Path) -> list[str]:
    """The files that are a model each, of the first kind there is any of."""
    if (folder / PIPELINE).is_file():
        return []
    # a link to nothing is there, and fails when opened
    present = sorted(path.name for path in folder.iterdir() if not path.is_dir() and _may_be_weights(path.name))
    for usual in (SINGLE, _PICKLED):
        if found := [name for single in usual if (name := _usual(single, present))]:
            return found
    for pattern in (_SAFETENSORS, _TORCH):
        of_kind = [name for name in present if pattern.fullmatch(name)]
        indices = [name for name in of_kind if is_index(name)]
        if found := indices + [name for name in of_kind if indices and _VARIANT.fullmatch(name)] or of_kind:
            return found
    return []


def _may_be_weights(name: str) -> bool:
    return not _STATE.fullmatch(name) and name != RECORD and not name.endswith(f".{RECORD}")


def _usual(single: str, present: list[str]) -> str | None:
    """A file of its usual name, else the index of that name."""
    return next((name for name in (single, f"{single}.index.json") if name in present), None)


def _unclear(folder: Path, found: list[str]) -> LoratoolsError:
    if found:
        return AmbiguousError("holds several models", file=folder, found=", ".join(found[:4]), remedy="name one of them as the path")
    if (folder / PIPELINE).is_file():
        return AmbiguousError("a pipeline of several models", file=folder, remedy="name one of its folders, such as unet/ or transformer/")
    if (folder / "adapter_config.json").is_file():
        return FormatError("an adapter, where a model was expected", file=folder)
    others = sorted(path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))
    if others:
        remedy = "save it as safetensors first"
        return UnsupportedError("no model of safetensors or torch in it", file=folder, found=", ".join(others[:4]), remedy=remedy)
    return FormatError("no weights in it", file=folder, expected="model.safetensors or model.safetensors.index.json")


def weight_map(index: Path) -> Mapping[str, str]:
    """An index's names by shard, each a file that lies beside it. Raises FormatError, all faults together."""
    table = read_json(index)
    names = table.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise FormatError("the index needs a weight_map of names to files", file=index)
    if not isinstance(table.get("metadata", {}), dict):
        raise FormatError("the index's metadata is not an object", file=index)
    faults: list[LoratoolsError] = []
    for shard, name in {shard: name for name, shard in reversed(names.items())}.items():
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            faults.append(FormatError("a shard must be a plain file name", file=index, tensor=name, found=repr(shard)))
        elif not (index.parent / shard).is_file():
            faults.append(FormatError("a shard is missing", file=index.parent / shard, tensor=name, remedy="download it again"))
    raise_all(faults)
    return names
