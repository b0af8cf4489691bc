"""A pipeline of several models as one checkpoint: diffusers' folder, its `model_index.json` and a folder for each model.

A tensor's name is its model's folder, a dot and its own name, as adapters of pipelines spell it (`unet.down_blocks…`). Each
model stays a `Checkpoint` of its own, whose config tells of its tensors alone; one that nothing changes is copied byte for
byte, whatever lies in its folder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from loratools import sidefiles
from loratools.checkpoint import Checkpoint
from loratools.digests import digests, weights_entry
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, raise_all
from loratools.families import Families, Family
from loratools.jsonfile import read_json
from loratools.needed import RECEIPT, of_model
from loratools.refs import Ref
from loratools.rewrite import Change, Rewritten
from loratools.source import local
from loratools.source.handles import lacking, name_of
from loratools.weightfiles import PIPELINE, holds_model

T = TypeVar("T")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The base model, or the pipeline of models, at a path or in a repository on the Hub, which is downloaded.

    Raises what `Checkpoint` and `Pipeline` raise, and `source.local`.
    """
    path = local(path, of_model)
    found = Pipeline(path) if (path / PIPELINE).is_file() else Checkpoint(path)
    left = [] if found.single else lacking(found.folder)
    if left:
        files = f"{len(left)} file{'s' if len(left) > 1 else ''}"
        found.notes.append(f"not downloaded, {files} of {name_of(found.folder)}: {', '.join(left[:4])}{', …' if len(left) > 4 else ''}")
    return found


class Pipeline(Checkpoint):
    """The models that a `model_index.json` lists and whose folders hold weights, as one checkpoint.

    Raises FormatError for a list that lies and for a pipeline without weights, and what opening its models raises, all together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self.folder = Path(path)
        self.index_name, self.shards, self.stored = None, {}, {}
        self._listed = _listed(self.folder / PIPELINE)
        self.components = _open_all(self.folder, self._listed)
        if not self.components:
            raise FormatError("a pipeline none of whose folders holds weights", file=self.folder)
        self._assemble()

    def _assemble(self) -> None:
        """The tensors and files of its models under one roof."""
        self.files = {f"{name}/{file}": opened for name, part in self.components.items() for file, opened in part.files.items()}
        self._refs: dict[str, Ref] = {prefix + name: ref for prefix, part in self.parts.items() for name, ref in part.items()}
        self.notes = [f"{name}: {note}" for name, part in self.components.items() for note in part.notes]
        lacking = [name for name in self._listed if not (self.folder / name).is_dir()]
        self.notes += [f"{PIPELINE} lists {name}, and there is no such folder" for name in lacking]
        self.shared = [tuple(prefix + name for name in names) for prefix, part in self.parts.items() for names in part.shared]

    @property
    def parts(self) -> Mapping[str, Checkpoint]:
        return {f"{name}.": part for name, part in self.components.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Nothing: each of its models has a config of its own."""
        return {}

    @property
    def quantization(self) -> str | None:
        found = {name: part.quantization for name, part in self.components.items()}
        return ", ".join(f"{name}: {scheme}" for name, scheme in found.items() if scheme) or None

    @property
    def unlike(self) -> str | None:
        return "a pipeline of several models"

    @property
    def computed(self) -> bool:
        return any(part.computed for part in self.components.values())

    @property
    def dequantizable(self) -> bool:
        quantised = [part for part in self.components.values() if part.quantization]
        return bool(quantised) and all(part.dequantizable for part in quantised)

    def dequantized(self, dtype: str | None = None) -> Checkpoint:
        made = copy.copy(self)
        made.__dict__.pop("specs", None)
        made.components = {name: part.dequantized(dtype) for name, part in self.components.items()}
        made._assemble()
        return made

    def family(self, embeddings: tuple[str, ...] = (), transposed: tuple[str, ...] = ()) -> Family:
        return Families({}, embeddings, transposed, {prefix: part.family() for prefix, part in self.parts.items()})

    # -- writing

    def rewrite(
        self,
        out: Path,
        change: Mapping[str, Change],
        *,
        added: Mapping[str, Change] | None = None,
        config: Mapping[str, Any] | None = None,
        workers: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rewritten:
        """Write the pipeline to `out`, model after model; keys of `change`, `added` and `config` begin with a model's name and a dot."""
        done = Rewritten()
        out.mkdir()
        specs = self.specs | {name: item.spec for name, item in {**change, **(added or {})}.items()}
        total, before = sum(spec.nbytes for spec in specs.values()), 0
        for name, part in self.components.items():
            mine = [_below(f"{name}.", table) for table in (change, added or {}, config or {})]
            told = partial(_from, before, total, progress) if progress else None
            if any(mine) or part.computed:
                made = part.rewrite(out / name, mine[0], added=mine[1], config=mine[2], workers=workers, progress=told)
            else:
                made = _copied(part, out / name, workers, told)
            _take(done, name, made)
            before += sum(spec.nbytes for key, spec in specs.items() if key.startswith(f"{name}."))
        self._copy_beside(out, done)
        return done

    def _copy_beside(self, out: Path, done: Rewritten) -> None:
        """What lies outside its models' folders; listed folders without weights that can be opened are copied whole."""
        for name, reason in sidefiles.beside(self.folder, {RECEIPT, sidefiles.RECORD}):
            top, _, inner = name.partition("/")
            if top in self.components and "/" in name:
                continue
            if reason is None or (reason in sidefiles.STALE and inner and top in self._listed):
                done.files.append(sidefiles.copy(self.folder / name, out / name, name))
            else:
                done.left_out.append({"name": name, "reason": reason, "relative_norm": None})


def _listed(path: Path) -> list[str]:
    """The models and other parts that the pipeline's index lists: `name: [library, class]`; what it does without is null."""
    table = read_json(path)
    pairs = {name: value for name, value in table.items() if isinstance(value, list) and len(value) == 2 and not name.startswith("_")}
    names = [name for name, value in pairs.items() if all(isinstance(word, str) for word in value)]
    odd = [name for name in names if not name.isidentifier()]  # a path would lead out of the folder
    raise_all(FormatError("a part's name must be letters, digits and _", file=path, found=repr(name)) for name in odd)
    return names


def _open_all(folder: Path, names: list[str]) -> dict[str, Checkpoint]:
    found, faults = {}, list[LoratoolsError]()
    for name in names:
        if not holds_model(folder / name):
            continue
        try:
            found[name] = Checkpoint(folder / name)
        except LoratoolsError as error:
            if isinstance(error, AmbiguousError):
                error.remedy = "leave one of them in the folder"
            faults.append(error)
    raise_all(faults)
    return found


def _below(prefix: str, table: Mapping[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): value for name, value in table.items() if name.startswith(prefix)}


def _from(before: int, total: int, progress: Callable[[int, int], None], done: int, _: int) -> None:
    progress(before + done, total)


def _copied(part: Checkpoint, out: Path, workers: int, progress: Callable[[int, int], None] | None) -> Rewritten:
    """A model's folder byte for byte, with the digests of its tensors."""
    read = digests(part, workers)
    done = Rewritten(read=read, written=read)
    for name, reason in sidefiles.beside(part.folder):
        if reason is not None and reason not in sidefiles.STALE:
            done.left_out.append({"name": name, "reason": reason, "relative_norm": None})
            continue
        row, file = sidefiles.copy(part.folder / name, out / name, name), part.files.get(name)
        if file is not None and file.header_sha256 is not None:
            row = weights_entry(name, file.size, file.header_sha256, {key: done.read[key] for key in file})
        done.files.append(row)
    if progress:
        progress(part.nbytes, part.nbytes)
    return done


def _take(done: Rewritten, component: str, made: Rewritten) -> None:
    """Add what was done to one model, under its name."""
    done.read |= {f"{component}.{name}": digest for name, digest in made.read.items()}
    done.written |= {f"{component}.{name}": digest for name, digest in made.written.items()}
    done.files += [row | {"path": f"{component}/{row['path']}"} for row in made.files]
    done.changed_files += [f"{component}/{name}" for name in made.changed_files]
    done.left_out += [row | {"name": f"{component}/{row['name']}"} for row in made.left_out]
    done.notes += [f"{component}: {note}" for note in made.notes]
