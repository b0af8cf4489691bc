"""Which files of a repository's folder a model is read from, and which a rewrite copies: those that are downloaded.

The same rules that find and copy files on disk (weightfiles, sidefiles), asked of a folder whose files may be placeholders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from loratools.jsonfile import read_json
from loratools.sidefiles import beside
from loratools.weightfiles import PIPELINE, holds_model, is_index, model_file, weight_map

RECEIPT = "loratools.json"


def of_model(path: Path) -> list[Path]:
    """The files of the model, or the pipeline of models, at a path. Raises what finding its weights raises."""
    if path.is_file() and not is_index(path.name):
        return [path, *_there(path.parent / "config.json", path.parent / f"{path.name}.{RECEIPT}")]
    folder = path if path.is_dir() else path.parent
    if (folder / PIPELINE).is_file():
        return list(dict.fromkeys([*_copied(folder), *(file for name in _models(folder) for file in _whole(folder / name))]))
    return list(dict.fromkeys([*_weights(path), *_copied(folder)]))


def _weights(path: Path) -> Iterator[Path]:
    folder, name = path if path.is_dir() else path.parent, model_file(path)
    yield folder / name
    if is_index(name):
        yield from (folder / shard for shard in dict.fromkeys(weight_map(folder / name).values()))


def _copied(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name, reason in beside(folder) if reason is None)


def _models(folder: Path) -> list[str]:
    """The parts a pipeline lists that lie in it."""
    table = read_json(folder / PIPELINE)
    return [name for name, value in table.items() if isinstance(value, list) and name.isidentifier() and (folder / name).is_dir()]


def _whole(folder: Path) -> list[Path]:
    """A part of a pipeline: its model and what lies beside it, or everything where there is no model that can be opened."""
    if holds_model(folder):
        return [*_weights(folder), *_copied(folder)]
    return [path for path in folder.rglob("*") if path.is_file()]


def _there(*paths: Path) -> Iterable[Path]:
    return [path for path in paths if path.is_file()]
