"""A base model on disk: one safetensors file, a folder with one, or an index with shards, opened from headers alone.

`Checkpoint` is a lazy mapping of names to `Ref`s; `rewrite` maps it to another checkpoint with the same names, order, shards
and index, a few blocks of memory at a time, tensors that do not change as bytes. Layouts of files: transformers' and
diffusers' `save_pretrained`; spec/checkpoint.md tells what is copied and what is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

from loratools import threads
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, MatchError, UnsupportedError, raise_all
from loratools.quantized import scheme
from loratools.tensorfile import Buffer, Ref, Spec, TensorFile, TensorWriter

SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX = ".safetensors.index.json"
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".gguf", ".h5", ".msgpack", ".npz", ".ot", ".tflite",
    ".pdparams", ".mlmodel", ".safetensors.index.json", ".bin.index.json",
)  # fmt: skip
PRIVATE = (".git", ".cache", "__pycache__", ".ipynb_checkpoints")
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
        self.index_name, names = self._weight_files()
        self.files = _open_all(self.folder, names)
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
        return not self.path.is_dir()

    # -- which files hold the weights

    def _weight_files(self) -> tuple[str | None, list[str]]:
        if not self.path.exists():
            raise FormatError("no such file or folder", file=self.path)
        if self.path.is_file() and self.path.name.endswith(INDEX):
            return self.path.name, self._shards(self.path.name)
        if self.path.is_file():
            return None, [self.path.name]
        for name in SINGLE:
            if (self.path / name).is_file():
                return None, [name]
        indices = sorted(path.name for path in self.path.glob("*" + INDEX))
        plain = [name for name in indices if name in {single.removesuffix(".safetensors") + INDEX for single in SINGLE}] or indices
        if len(plain) == 1:
            return plain[0], self._shards(plain[0])
        singles = [] if plain else sorted(path.name for path in self.path.glob("*.safetensors"))
        if len(singles) == 1:
            return None, singles
        raise self._unclear(plain or singles)

    def _unclear(self, found: list[str]) -> LoratoolsError:
        if found:
            return AmbiguousError("holds several models", file=self.path, found=", ".join(found[:4]), remedy="name one of them as the path")
        if (self.path / "model_index.json").is_file():
            return AmbiguousError(
                "a pipeline of several models", file=self.path, remedy="name one of its folders, such as unet/ or transformer/"
            )
        if (self.path / "adapter_config.json").is_file():
            return FormatError("an adapter, where a model was expected", file=self.path)
        others = sorted(path.name for path in self.path.iterdir() if path.name.endswith(WEIGHTS))
        if others:
            return UnsupportedError(
                "no safetensors in it", file=self.path, found=", ".join(others[:4]), remedy="save it as safetensors first"
            )
        return FormatError("no weights in it", file=self.path, expected="model.safetensors or model.safetensors.index.json")

    def _shards(self, index: str) -> list[str]:
        file = self.folder / index
        table = read_json(file).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()) or not table:
            raise FormatError("the index needs a weight_map of names to files", file=file)
        self._map = table
        faults: list[LoratoolsError] = []
        for shard, name in {shard: name for name, shard in table.items()}.items():
            if Path(shard).name != shard or "\\" in shard or shard in (".", ".."):
                faults.append(FormatError("a shard must be a plain file name", file=file, tensor=name, found=shard))
            elif not (self.folder / shard).is_file():
                faults.append(FormatError("a shard is missing", file=self.folder / shard, tensor=name, remedy="download it again"))
        raise_all(faults)
        return sorted(set(table.values()))

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
            jobs = [partial(self._pass, writers[name], key, change.get(key), done, tell) for name, file in self.files.items() for key in file]
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
        for relative, reason in self.beside():
            if reason is not None:
                done.left_out.append({"name": relative, "reason": reason, "relative_norm": None})
            elif relative not in ("config.json", self.index_name):
                target = out / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / relative, target)
                done.files.append(file_entry(target, relative))

    def beside(self) -> Iterator[tuple[str, str | None]]:
        """Every other file of the folder, relative, with the reason it is not copied, if any; a folder ends in '/'."""
        for path, folders, names in os.walk(self.folder):
            relative = Path(path).relative_to(self.folder)
            for name in sorted(folders):
                reason = "version control or cache" if name in PRIVATE else None
                reason = "other weights" if name == "original" and relative == Path() else reason
                reason = "a link to a folder" if Path(path, name).is_symlink() else reason
                if reason:
                    folders.remove(name)
                    yield f"{(relative / name).as_posix()}/", reason
            for name in sorted(names):
                shown = (relative / name).as_posix()
                if shown in self.files or shown == "loratools.json":
                    continue
                stale = name.endswith(WEIGHTS) and shown != self.index_name
                yield shown, "other weights, stale beside these" if stale else None

    def _write_config(self, out: Path, values: Mapping[str, Any], done: Rewritten) -> None:
        source, target = self.folder / "config.json", out / "config.json"
        if not source.is_file():
            return
        config = with_values(self.config, values)
        if config == self.config:
            shutil.copyfile(source, target)
        else:
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            done.changed_files.append("config.json")
        done.files.append(file_entry(target, "config.json"))

    def _write_index(self, out: Path, change: Mapping[str, Change], added: Mapping[str, Change], done: Rewritten) -> None:
        if self.index_name is None:
            return
        source, target = self.folder / self.index_name, out / self.index_name
        index = read_json(source)
        growth = sum(item.spec.nbytes - self[name].spec.nbytes for name, item in change.items())
        growth += sum(item.spec.nbytes for item in added.values())
        if growth or added:
            last = list(self.files)[-1]
            metadata = index.setdefault("metadata", {})
            if isinstance(metadata.get("total_size"), int):
                metadata["total_size"] += growth
            if isinstance(metadata.get("total_parameters"), int):
                more = sum(item.spec.numel - self[name].spec.numel for name, item in change.items())
                metadata["total_parameters"] += more + sum(item.spec.numel for item in added.values())
            index["weight_map"] |= dict.fromkeys(added, last)
            target.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            done.changed_files.append(self.index_name)
        else:
            shutil.copyfile(source, target)
        done.files.append(file_entry(target, self.index_name))


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; FormatError naming it for anything else."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"not readable as JSON: {error}", file=path) from None
    if not isinstance(table, dict):
        raise FormatError("not a JSON object", file=path)
    return table


def combined_digest(digests: Mapping[str, str]) -> str:
    """BLAKE3 of the tensors' digests, as bytes, in the order of their names: the identity of a set of weights."""
    digest = blake3()
    for name in sorted(digests):
        digest.update(bytes.fromhex(digests[name]))
    return digest.hexdigest()


def weights_entry(name: str, size: int, header_sha256: str, digests: Mapping[str, str]) -> dict[str, Any]:
    return {"path": name, "bytes": size, "header_sha256": header_sha256, "blake3": combined_digest(digests)}


def file_entry(path: Path, name: str) -> dict[str, Any]:
    """A file's row in a receipt: BLAKE3 of its bytes."""
    digest = blake3()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"path": name, "bytes": path.stat().st_size, "header_sha256": None, "blake3": digest.hexdigest()}
