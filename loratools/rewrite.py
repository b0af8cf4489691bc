"""A checkpoint written anew: the same names, order, shards and index, a few blocks of memory at a time.

Tensors that do not change pass as bytes; config and index follow those that do. What torch pickled is written as safetensors.
spec/checkpoint.md tells what is copied and what is left out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from blake3 import blake3

from loratools import sidefiles, threads
from loratools.digests import digests, weights_entry
from loratools.errors import LoratoolsError
from loratools.jsonfile import read_json, with_values, write_json
from loratools.needed import RECEIPT
from loratools.refs import Buffer, Ref, Spec
from loratools.tensorfile import WeightFile
from loratools.tensorwriter import TensorWriter
from loratools.torchfile import PICKLES
from loratools.weightfiles import as_safetensors

_Tell: TypeAlias = Callable[[Iterable[Buffer]], Iterable[Buffer]]
Seen = Callable[[Buffer], object]


@dataclass(frozen=True)
class Change:
    """What a tensor becomes: its new spec, and its bytes in blocks; each block read of the old one is told to `seen`."""

    spec: Spec
    blocks: Callable[[Seen], Iterable[Buffer]]


@dataclass
class Rewritten:
    """What a rewrite did: digests of tensors read and written, files made, JSON files that differ, what was left out, what to say."""

    read: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    files: list[dict[str, Any]] = field(default_factory=list)
    changed_files: list[str] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Rewritable(Protocol):
    """What is asked of a checkpoint that is written anew; `checkpoint.Checkpoint` is one.

    `shards` says in which file the index puts each tensor; `stored` are the tensors it was made of, where it was computed.
    """

    @property
    def path(self) -> Path: ...
    @property
    def folder(self) -> Path: ...
    @property
    def files(self) -> Mapping[str, WeightFile]: ...
    @property
    def index_name(self) -> str | None: ...
    @property
    def shards(self) -> Mapping[str, str]: ...
    @property
    def stored(self) -> Mapping[str, Ref]: ...
    @property
    def specs(self) -> Mapping[str, Spec]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def single(self) -> bool: ...
    @property
    def unlike(self) -> str | None: ...
    def __getitem__(self, name: str) -> Ref: ...


def rewrite(
    source: Rewritable,
    out: Path,
    change: Mapping[str, Change],
    *,
    added: Mapping[str, Change] | None = None,
    config: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Rewritten:
    """Write a checkpoint to `out` with some tensors changed; `added` ones go at the end of the last file.

    `config` holds keys of config.json to set (None removes one). Tensors pass in file order, one a worker at a time;
    `progress` is told the bytes written and those to be written after each block, by whichever worker wrote it.
    Raises what the changes raise; the caller owns `out` and removes it on failure.
    """
    work = _Rewriting(source, out, change, added or {})
    if not source.single:
        out.mkdir()
    work.write(workers, progress)
    if source.stored:
        work.done.read = digests(source.stored, workers)
    if not source.single:
        work.copy_beside()
        work.write_config({**(config or {}), **({"quantization_config": None} if source.stored else {})})
        work.write_index()
    return work.done


@dataclass
class _Rewriting:
    """One rewrite under way."""

    source: Rewritable
    out: Path
    change: Mapping[str, Change]
    added: Mapping[str, Change]
    done: Rewritten = field(default_factory=Rewritten)

    def write(self, workers: int, progress: Callable[[int, int], None] | None) -> None:
        """The files of weights, each synced as soon as its last tensor is written."""
        files, last = self.source.files, list(self.source.files)[-1]
        writers = {}
        try:
            for name, file in files.items():
                specs = {key: self.change[key].spec if key in self.change else ref.spec for key, ref in file.items()}
                specs |= {key: item.spec for key, item in self.added.items()} if name == last else {}
                target = self.out if self.source.single else self.out / as_safetensors(name)
                writers[name] = TensorWriter(target, specs, file.metadata)
            tell = _counter(progress, sum(spec.nbytes for writer in writers.values() for spec in writer.specs.values()))
            jobs = [partial(self._pass, writers[name], key, tell) for name, file in files.items() for key in file]
            jobs += [partial(self._add, writers[last], key, tell) for key in self.added]
            with threads.Background() as background:
                closing = [partial(writer.when_complete, partial(background.start, writer.close)) for writer in writers.values()]
                threads.run_all([partial(_then, job, closing) for job in jobs], workers)
            for writer in writers.values():
                writer.close()
        finally:
            for writer in writers.values():
                writer.abandon()
        for name, writer in writers.items():
            self.done.files.append(weights_entry(writer.path.name, writer.size, writer.header_sha256, writer.digests))
            if name.endswith(PICKLES):
                self.done.notes.append(f"written as safetensors: {writer.path.name}, from {name}")

    def _pass(self, writer: TensorWriter, name: str, tell: _Tell) -> None:
        change, done = self.change.get(name), self.done
        if change is None:
            done.read[name] = done.written[name] = writer.write(name, tell(self.source[name].blocks()))
            return
        digest = blake3()
        try:
            done.written[name] = writer.write(name, tell(change.blocks(digest.update)))
        except LoratoolsError as error:
            raise error.at(file=self.source.path, tensor=name) from None
        done.read[name] = digest.hexdigest()

    def _add(self, writer: TensorWriter, name: str, tell: _Tell) -> None:
        self.done.written[name] = writer.write(name, tell(self.added[name].blocks(lambda _: None)))

    def copy_beside(self) -> None:
        """The files that lie beside the weights, or a row for what is left out."""
        folder = self.source.folder
        known = {*self.source.files, RECEIPT, sidefiles.RECORD, self.source.index_name or "", "config.json"}
        for name, reason in sidefiles.beside(folder, known):
            if reason is None:
                self.done.files.append(sidefiles.copy(folder / name, self.out / name, name))
            else:
                self.done.left_out.append({"name": name, "reason": reason, "relative_norm": None})

    def write_config(self, values: Mapping[str, Any]) -> None:
        """config.json, as it was unless a key changes."""
        there, target = self.source.folder / "config.json", self.out / "config.json"
        if not there.is_file():
            return
        config = with_values(self.source.config, values)
        if config == self.source.config:
            self.done.files.append(sidefiles.copy(there, target, "config.json"))
        else:
            self._write_changed(target, config)

    def write_index(self) -> None:
        """The index, as it was unless a tensor, a file's name or a size that it tells changes."""
        source = self.source
        if source.index_name is None:
            return
        there, target = source.folder / source.index_name, self.out / as_safetensors(source.index_name)
        index = read_json(there)
        where = {name: as_safetensors(shard) for name, shard in source.shards.items() if name in source.specs}
        where |= dict.fromkeys(self.added, as_safetensors(list(source.files)[-1]))
        before = list(source.specs.values())
        after = [self.change[name].spec if name in self.change else spec for name, spec in source.specs.items()]
        after += [item.spec for item in self.added.values()]
        growth = sum(spec.nbytes for spec in after) - sum(spec.nbytes for spec in before)
        if not growth and where == index["weight_map"]:
            self.done.files.append(sidefiles.copy(there, target, target.name))
            return
        more = sum(spec.numel for spec in after) - sum(spec.numel for spec in before)
        totals = index.setdefault("metadata", {})
        for key, plus, now in (
            ("total_size", growth, sum(spec.nbytes for spec in after)),
            ("total_parameters", more, sum(spec.numel for spec in after)),
        ):
            if isinstance(totals.get(key), int | float):
                totals[key] = now if source.unlike else totals[key] + plus
        index["weight_map"] = where
        self._write_changed(target, index)

    def _write_changed(self, path: Path, table: Mapping[str, Any]) -> None:
        write_json(path, table)
        self.done.files.append(sidefiles.file_entry(path, path.name))
        self.done.changed_files.append(path.name)


def _then(job: Callable[[], object], after: Iterable[Callable[[], object]]) -> None:
    job()
    for call in after:
        call()


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
