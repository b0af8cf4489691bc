"""A base model on disk: one file of weights, a folder with one, or an index with shards, opened from headers alone.

`Checkpoint` is a lazy mapping of names to `Ref`s; `rewrite` maps it to another checkpoint with the same names, order, shards
and index, a few blocks of memory at a time, tensors that do not change as bytes. What torch pickled is read through a mapping
and written as safetensors. Layouts of files: transformers' and diffusers' `save_pretrained`; spec/checkpoint.md tells what is
copied and what is left out.
"""

from __future__ import annotations

import copy
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

from loratools import sidefiles, threads
from loratools.codes import FourBit
from loratools.dequantize import Plain, dequantized, known
from loratools.errors import LoratoolsError, MatchError, QuantizedError, raise_all
from loratools.families import Family
from loratools.jsonfile import read_json, write_json
from loratools.needed import RECEIPT as RECEIPT
from loratools.needed import of_model
from loratools.quantized import method, scheme
from loratools.source import local
from loratools.tensorfile import Buffer, Ref, Spec, TensorFile, WeightFile
from loratools.tensorwriter import TensorWriter
from loratools.torchfile import PICKLES, TorchFile
from loratools.weightfiles import as_safetensors, is_index, model_file, weight_map

_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # transformers ties both to shared.weight
Seen = Callable[[Buffer], object]
_Tell: TypeAlias = Callable[[Iterable[Buffer]], Iterable[Buffer]]


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


class Checkpoint(Mapping[str, Ref]):
    """A base model's tensors by name, not read yet, from a folder, a file or a repository on the Hub, which is downloaded.

    `notes` are what a person should be told of its files; `shared` the sets of names that stand for one tensor in a pickle and
    are written as a tensor each. Raises FormatError for a header, index or pickle that lies, MatchError for a tensor that is not
    where the index says, AmbiguousError for a folder with several models, UnsupportedError for one with weights of other kinds, and what
    `source.local` raises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local(path, of_model)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        name = model_file(self.path)
        self.index_name = name if is_index(name) else None
        self._map = weight_map(self.folder / name) if self.index_name else {}
        self.files = _open_all(self.folder, sorted(set(self._map.values())) if self.index_name else [name])
        self._check_names()
        self._stored: Mapping[str, Ref] = {}  # what a dequantised checkpoint was made of
        self.notes: list[str] = []
        self.shared: list[tuple[str, ...]] = []
        for name, file in self.files.items():
            if isinstance(file, TorchFile):
                self.files[name] = self._without_ties(file)
        self._refs = {name: ref for file in self.files.values() for name, ref in file.items()}

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
        return None if self._stored else scheme(self.specs, self.config)

    @property
    def computed(self) -> bool:
        """Whether its tensors are not those of its files, but made of them."""
        return bool(self._stored)

    @property
    def dequantizable(self) -> bool:
        """Whether its weights are quantised, and in a way that `dequantized` reads."""
        return bool(self.quantization) and known(self.specs, self.config)

    def dequantized(self, dtype: str | None = None) -> Checkpoint:
        """The checkpoint as plain weights, in `dtype` or the one its quantiser names; itself if it is not quantised.

        Raises QuantizedError for other schemes, FormatError and ShapeError for parts that do not fit together.
        """
        if not self.quantization:
            return self
        try:
            plain = dequantized(self._refs, self.config, dtype)
            self._check_turned(plain)
        except LoratoolsError as error:
            raise error.at(file=self.path) from None
        made = copy.copy(self)
        made.__dict__.pop("specs", None)
        made._refs, made._stored = plain.refs, self._refs
        refs = {name: {key: plain.refs[key] for key in file if key in plain.refs} for name, file in self.files.items()}
        made.files = {name: file.with_tensors(refs[name]) for name, file in self.files.items()}
        codes = Counter(plain.refs[name].spec.dtype for name in plain.computed)
        told = ", ".join(f"{count} weight{'s' if count > 1 else ''} as {code}" for code, count in codes.items())
        made.notes = [*self.notes, f"dequantised ({self.quantization}): {told}"]
        if plain.left_out:
            count, first = len(plain.left_out), plain.left_out[0]
            made.notes.append(f"scales of activations left out, as plain weights have none: {count} of them, such as {first}")
        if self.single and method(self.config):
            made.notes.append("the output is one file; the config.json it is used with must lose its quantization_config")
        return made

    def _check_turned(self, plain: Plain) -> None:
        """bitsandbytes' layers hold what a Conv1D stores (in, out) the other way round: as plain weights they would be wrong."""
        turned = [name for name in plain.computed if isinstance(plain.refs[name], FourBit) and self.family().transposed(name)]
        if turned:
            fact = "turned when it was quantised, and the plain model stores it (in, out): not dequantised"
            raise QuantizedError(fact, tensor=turned[0], remedy="merge into the original 16- or 32-bit weights")

    def family(self, embeddings: tuple[str, ...] = (), transposed: tuple[str, ...] = ()) -> Family:
        """What its config says of its tensors, with the user's globs on top."""
        return Family(self.config, embeddings, transposed)

    @property
    def parts(self) -> Mapping[str, Checkpoint]:
        """The models it is made of, by what their tensors' names begin with: itself, unless it is a pipeline."""
        return {"": self}

    @property
    def unlike(self) -> str | None:
        """What makes its output's files or tensors others than its own, in words, if anything does."""
        if self._stored:
            return "weights that are dequantised"
        pickled = next((name for name in self.files if name.endswith(PICKLES)), None)
        return f"{pickled}, which is written as safetensors" if pickled else None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def single(self) -> bool:
        """Whether it was opened as one file, so that nothing beside it belongs to it."""
        return self.path.is_file() and self.index_name is None

    def _check_names(self) -> None:
        held = Counter(name for file in self.files.values() for name in file)
        twice = next((name for name, count in held.items() if count > 1), None)
        if twice is not None:
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

    def _without_ties(self, file: TorchFile) -> WeightFile:
        """The file's tensors, but those that transformers drops where it writes safetensors: the config ties them to another."""
        if not file.mapped:
            self.notes.append(f"{file.path.name} is of a torch before 1.6: it cannot be mapped, and is read whole")
        if file.beside:
            self.notes.append(f"not weights, left out of {file.path.name}: {', '.join(file.beside)}")
        dropped: dict[str, str] = {}
        for names in file.aliases:
            dropped |= _ties(names, self.family().tied(file))
            kept = tuple(name for name in names if name not in dropped)
            if len(kept) > 1:
                self.shared.append(kept)
                self.notes.append(f"one tensor in {file.path.name}, written as a tensor each: {', '.join(kept)}")
        self.notes += [f"left out, as it is tied to {other}: {name}" for name, other in dropped.items()]
        return file.with_tensors({name: ref for name, ref in file.items() if name not in dropped})

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
        targets = {name: out if self.single else out / as_safetensors(name) for name in self.files}
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
        for name, writer in writers.items():
            done.files.append(weights_entry(writer.path.name, writer.size, writer.header_sha256, writer.digests))
            if name.endswith(PICKLES):
                done.notes.append(f"written as safetensors: {writer.path.name}, from {name}")
        if self._stored:
            done.read = digests(self._stored, workers)
        if not self.single:
            self._copy_beside(out, done)
            self._write_config(out, {**(config or {}), **({"quantization_config": None} if self._stored else {})}, done)
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
        source, target = self.folder / self.index_name, out / as_safetensors(self.index_name)
        index = read_json(source)
        where = {name: as_safetensors(shard) for name, shard in self._map.items() if name in self}
        where |= dict.fromkeys(added, as_safetensors(list(self.files)[-1]))
        before = list(self.specs.values())
        after = [change[name].spec if name in change else spec for name, spec in self.specs.items()]
        after += [item.spec for item in added.values()]
        growth = sum(spec.nbytes for spec in after) - sum(spec.nbytes for spec in before)
        if not growth and where == index["weight_map"]:
            done.files.append(sidefiles.copy(source, target, target.name))
            return
        more = sum(spec.numel for spec in after) - sum(spec.numel for spec in before)
        totals = index.setdefault("metadata", {})
        for key, plus, now in (
            ("total_size", growth, sum(spec.nbytes for spec in after)),
            ("total_parameters", more, sum(spec.numel for spec in after)),
        ):
            if isinstance(totals.get(key), int | float):
                totals[key] = now if self.unlike else totals[key] + plus
        index["weight_map"] = where
        _write_changed(target, index, done)


def _write_changed(path: Path, table: Mapping[str, Any], done: Rewritten) -> None:
    write_json(path, table)
    done.files.append(sidefiles.file_entry(path, path.name))
    done.changed_files.append(path.name)


def _ties(names: tuple[str, ...], tied: tuple[str, str] | None) -> dict[str, str]:
    """Of names of one tensor those that the model makes of another one, and which: of its embedding, its head's bias."""
    embedding, head = tied or ("", "")
    pairs = [(head, embedding), (head.removesuffix("weight") + "bias", head.replace("decoder.weight", "bias"))]
    pairs += [(name, other) for name in names for other in names if name.endswith(_SHARED) and other.endswith("shared.weight")]
    return {name: other for name, other in pairs if name != other and name in names and other in names}


def _open_all(folder: Path, names: Iterable[str]) -> dict[str, WeightFile]:
    files, faults = dict[str, WeightFile](), list[LoratoolsError]()
    for name in names:
        try:
            files[name] = (TorchFile if name.endswith(PICKLES) else TensorFile)(folder / name)
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
    """The config with keys set, in the nested text config where that is where they stand; None removes, from nested ones too."""
    changed = json.loads(json.dumps(config))
    for key, value in values.items():
        if value is None:
            continue
        text = changed.get("text_config")
        place = text if isinstance(text, dict) and key in text and key not in changed else changed
        place[key] = value
    gone = [key for key, value in values.items() if value is None]
    for part in (changed, *(value for value in changed.values() if isinstance(value, dict))):
        for key in gone:
            part.pop(key, None)
    return dict(changed)


def digests(refs: Mapping[str, Ref], workers: int = 1) -> dict[str, str]:
    """BLAKE3 of each tensor's bytes."""
    found: dict[str, str] = {}

    def digest(name: str, ref: Ref) -> None:
        made = blake3()
        for block in ref.blocks():
            made.update(block)
        found[name] = made.hexdigest()

    threads.run_all([partial(digest, name, ref) for name, ref in refs.items()], workers)
    return found


def combined_digest(digests: Mapping[str, str]) -> str:
    """BLAKE3 of the tensors' digests, as bytes, in the order of their names: the identity of a set of weights."""
    digest = blake3()
    for name in sorted(digests):
        digest.update(bytes.fromhex(digests[name]))
    return digest.hexdigest()


def weights_entry(name: str, size: int, header_sha256: str, digests: Mapping[str, str]) -> dict[str, Any]:
    return {"path": name, "bytes": size, "header_sha256": header_sha256, "blake3": combined_digest(digests)}
