"""A base model on disk: one safetensors file, a folder with one, or an index with shards, opened from headers alone.

`Checkpoint` is a lazy mapping of names to `Ref`s; `rewrite` maps it to another checkpoint with the same names, order, shards
and index, a few blocks of memory at a time, tensors that do not change as bytes. Layouts of files: transformers' and
diffusers' `save_pretrained`; spec/checkpoint.md tells what is copied and what is left out.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

from loratools import sidefiles, threads
from loratools.errors import LoratoolsError, MatchError, raise_all
from loratools.jsonfile import read_json, write_json
from loratools.quantized import scheme
from loratools.tensorfile import Buffer, Ref, Spec, TensorFile
from loratools.tensorwriter import TensorWriter
from loratools.weightfiles import INDEX, model_file, weight_map

RECEIPT = "loratools.json"
Seen = Callable[[Buffer], object]
_Tell: TypeAlias = Callable[[Iterable[Buffer]], Iterable[Buffer]]


@dataclass(frozen=True)
class Change:
    """What a tensor becomes: its new spec, and its bytes in blocks; each block read of the old one is told to `seen`."""

    spec: Spec
    blocks: Callable[[Seen], Iterable[Buffer]]


@dataclass
class Rewritten:
    """What a rewrite did: digests of the tensors read and written, files made, JSON files that differ, and what was left out."""

    read: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)


class Checkpoint(Mapping[str, Ref]):
    """A base model's tensors by name, not read yet.

    Raises FormatError for a header or index that lies, MatchError for a tensor that is not where the index says,
    AmbiguousError for a folder with several models, UnsupportedError for one without safetensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        name = model_file(self.path)
        self.index_name = name if name.endswith(INDEX) else None
        self._map = weight_map(self.folder / name) if self.index_name else {}
        self.files = _open_all(self.folder, sorted(set(self._map.values())) if self.index_name else [name])
        self._refs = {name: ref for file in self.files.values() for name, ref in file.items()}
        self._check_names()

    def __getitem__(self, name: str) -> Ref:
        return self._refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    @cached_property
    def specs(self) -> dict[str, Spec]:
        return {name: ref.spec for name, ref in self.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `config.json` beside the weights, or nothing."""
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def quantization(self) -> str | None:
        """The name of the scheme its weights are quantised in, if any."""
        return scheme(self.specs, self.config)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def single(self) -> bool:
        """Whether it was opened as one file, so that nothing beside it belongs to it."""
        return self.path.is_file() and self.index_name is None

    def _check_names(self) -> None:
        held = [name for file in self.files.values() for name in file]
        if len(held) != len(self._refs):
            twice = next(name for name in held if held.count(name) > 1)
            raise MatchError("a tensor lies in two shards", file=self.path, tensor=twice)
        if self.index_name is None:
            return
        index = self.folder / self.index_name
        where = {name: shard for shard, file in self.files.items() for name in file}
        faults: list[LoratoolsError] = [
            MatchError("not where the index says", file=index, tensor=name, found=where.get(name, "in no shard"), expected=shard)
            for name, shard in self._map.items()
            if where.get(name) != shard
        ]
        faults += [
            MatchError("the index does not list it", file=self.folder / where[name], tensor=name) for name in where if name not in self._map
        ]
        raise_all(faults)

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
        """Write the checkpoint to `out` with some tensors changed; `added` ones go at the end of the last file.

        `config` holds keys of config.json to set (None removes one). Tensors pass in file order, one a worker at a time;
        `progress` is told the bytes written and those to be written after each block, by whichever worker wrote it.
        Raises what the changes raise; the caller owns `out` and removes it on failure.
        """
        done = Rewritten()
        added = added or {}
        targets = {name: out if self.single else out / name for name in self.files}
        if not self.single:
            out.mkdir()
        writers = {}
        try:
            last = list(self.files)[-1]
            for name, file in self.files.items():
                specs = {key: change[key].spec if key in change else ref.spec for key, ref in file.items()}
                specs |= {key: item.spec for key, item in added.items()} if name == last else {}
                writers[name] = TensorWriter(targets[name], specs, file.metadata)
            tell = _counter(progress, sum(spec.nbytes for writer in writers.values() for spec in writer.specs.values()))
            places = [(writers[name], key) for name, file in self.files.items() for key in file]
            jobs = [partial(self._pass, writer, key, change.get(key), done, tell) for writer, key in places]
            jobs += [partial(_add, writers[last], key, item, done, tell) for key, item in added.items()]
            with threads.Background() as background:
                closing = [partial(writer.when_complete, partial(background.start, writer.close)) for writer in writers.values()]
                threads.run_all([partial(_then, job, closing) for job in jobs], workers)
            for writer in writers.values():
                writer.close()
        finally:
            for writer in writers.values():
                writer.abandon()
        for writer in writers.values():
            done.files.append(weights_entry(writer.path.name, writer.size, writer.header_sha256, writer.digests))
        if not self.single:
            self._copy_beside(out, done)
            self._write_config(out, config or {}, done)
            self._write_index(out, change, added, done)
        return done

    def _pass(self, writer: TensorWriter, name: str, change: Change | None, done: Rewritten, tell: _Tell) -> None:
        if change is None:
            done.read[name] = done.written[name] = writer.write(name, tell(self[name].blocks()))
            return
        digest = blake3()
        try:
            done.written[name] = writer.write(name, tell(change.blocks(digest.update)))
        except LoratoolsError as error:
            raise error.at(file=self.path, tensor=name) from None
        done.read[name] = digest.hexdigest()

    def _copy_beside(self, out: Path, done: Rewritten) -> None:
        for name, reason in sidefiles.beside(self.folder, {*self.files, RECEIPT, sidefiles.RECORD, self.index_name or "", "config.json"}):
            if reason is None:
                done.files.append(sidefiles.copy(self.folder / name, out / name, name))
            else:
                done.left_out.append({"name": name, "reason": reason, "relative_norm": None})

    def _write_config(self, out: Path, values: Mapping[str, Any], done: Rewritten) -> None:
        source, target = self.folder / "config.json", out / "config.json"
        if not source.is_file():
            return
        config = with_values(self.config, values)
        if config == self.config:
            done.files.append(sidefiles.copy(source, target, "config.json"))
        else:
            _write_changed(target, config, done)

    def _write_index(self, out: Path, change: Mapping[str, Change], added: Mapping[str, Change], done: Rewritten) -> None:
        if self.index_name is None:
            return
        source, target = self.folder / self.index_name, out / self.index_name
        index = read_json(source)
        growth = sum(item.spec.nbytes - self[name].spec.nbytes for name, item in change.items())
        growth += sum(item.spec.nbytes for item in added.values())
        if not growth and not added:
            done.files.append(sidefiles.copy(source, target, self.index_name))
            return
        more = sum(item.spec.numel - self[name].spec.numel for name, item in change.items())
        more += sum(item.spec.numel for item in added.values())
        totals = index.setdefault("metadata", {})
        for key, plus in (("total_size", growth), ("total_parameters", more)):
            if isinstance(totals.get(key), int | float):
                totals[key] += plus
        index["weight_map"] |= dict.fromkeys(added, list(self.files)[-1])
        _write_changed(target, index, done)


def _write_changed(path: Path, table: Mapping[str, Any], done: Rewritten) -> None:
    write_json(path, table)
    done.files.append(sidefiles.file_entry(path, path.name))
    done.changed_files.append(path.name)


def _open_all(folder: Path, names: Iterable[str]) -> dict[str, TensorFile]:
    files, faults = {}, list[LoratoolsError]()
    for name in names:
        try:
            files[name] = TensorFile(folder / name)
        except LoratoolsError as error:
            faults.append(error)
    raise_all(faults)
    return files


def _then(job: Callable[[], object], after: Iterable[Callable[[], object]]) -> None:
    job()
    for call in after:
        call()


def _add(writer: TensorWriter, name: str, change: Change, done: Rewritten, tell: _Tell) -> None:
    done.written[name] = writer.write(name, tell(change.blocks(lambda _: None)))


def _counter(progress: Callable[[int, int], None] | None, total: int) -> _Tell:
    """Hands blocks on and tells `progress` of each once the next is asked for, that is, when it was written."""
    if progress is None:
        return lambda blocks: blocks
    lock, done = threading.Lock(), 0

    def tell(blocks: Iterable[Buffer]) -> Iterator[Buffer]:
        nonlocal done
        for block in blocks:
            size = memoryview(block).nbytes
            yield block
            with lock:
                done += size
                progress(done, total)

    return tell


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The config with keys set, in the nested text config where that is where they stand; None removes."""
    changed = json.loads(json.dumps(config))
    for key, value in values.items():
        text = changed.get("text_config")
        place = text if isinstance(text, dict) and key in text and key not in changed else changed
        place[key] = value
    return {key: value for key, value in changed.items() if key not in values or values[key] is not None}


def combined_digest(digests: Mapping[str, str]) -> str:
    """BLAKE3 of the tensors' digests, as bytes, in the order of their names: the identity of a set of weights."""
    digest = blake3()
    for name in sorted(digests):
        digest.update(bytes.fromhex(digests[name]))
    return digest.hexdigest()


def weights_entry(name: str, size: int, header_sha256: str, digests: Mapping[str, str]) -> dict[str, Any]:
    return {"path": name, "bytes": size, "header_sha256": header_sha256, "blake3": combined_digest(digests)}
