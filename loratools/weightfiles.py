"""Which files of a folder hold a model's weights: one file, or an index with its shards.

The order is transformers' and diffusers': `model.safetensors` (or `diffusion_pytorch_model.safetensors`), then its index,
then the only index or the only safetensors file there is. spec/checkpoint.md tells the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loratools.errors import AmbiguousError, FormatError, LoratoolsError, UnsupportedError, raise_all
from loratools.jsonfile import read_json
from loratools.sidefiles import RECORD, WEIGHTS

SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX = ".safetensors.index.json"


def model_file(path: Path) -> str:
    """The name of the one file, weights or index, that the model at `path` is opened by.

    Raises FormatError for what is no model, AmbiguousError for several, UnsupportedError for one without safetensors.
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


def _models(folder: Path) -> list[str]:
    """The files that are a model each: those transformers and diffusers would load, else indices, else single files."""
    if (folder / "model_index.json").is_file():
        return []
    present = sorted(path.name for path in folder.iterdir() if not path.is_dir())  # a link to nothing is there, and fails when opened
    usual = [next((name for name in (single, _index_of(single)) if name in present), None) for single in SINGLE]
    found = [name for name in usual if name] or [name for name in present if name.endswith(INDEX)]
    found = found or [name for name in present if name.endswith(".safetensors")]
    return [name for name in found if not name.startswith("adapter_model.") and name != RECORD and not name.endswith(f".{RECORD}")]


def _index_of(single: str) -> str:
    return single.removesuffix(".safetensors") + INDEX


def _unclear(folder: Path, found: list[str]) -> LoratoolsError:
    if found:
        return AmbiguousError("holds several models", file=folder, found=", ".join(found[:4]), remedy="name one of them as the path")
    if (folder / "model_index.json").is_file():
        return AmbiguousError("a pipeline of several models", file=folder, remedy="name one of its folders, such as unet/ or transformer/")
    if (folder / "adapter_config.json").is_file():
        return FormatError("an adapter, where a model was expected", file=folder)
    others = sorted(path.name for path in folder.iterdir() if WEIGHTS.fullmatch(path.name))
    if others:
        remedy = "save it as safetensors first"
        return UnsupportedError("no safetensors model in it", file=folder, found=", ".join(others[:4]), remedy=remedy)
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
