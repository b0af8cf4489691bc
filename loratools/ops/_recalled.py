"""A merge recalled from its record: the base as it was told, the adapters found again by their bytes, the same plan made again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, cast

from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.corrections import inflated
from loratools.errors import FormatError, MatchError
from loratools.families import Family
from loratools.formats import load
from loratools.formats.base import read_options
from loratools.header import parse_header
from loratools.jsonfile import read_json
from loratools.plan import Plan
from loratools.planning import make_plan, split_renames, split_strength
from loratools.receipt import adapter_inputs
from loratools.record import Record
from loratools.refs import Ref, Spec
from loratools.source.handles import name_of
from loratools.source.place import SCHEME


@dataclass
class _Described(Mapping[str, Ref]):
    """The base as its headers and config tell it: what a plan asks of a checkpoint."""

    path: Path
    specs: dict[str, Spec]
    config: dict[str, Any]
    refs: Mapping[str, Ref]
    quantization: str | None = None
    dequantizable: bool = False
    single: bool = False
    shared: tuple[tuple[str, ...], ...] = ()

    @property
    def parts(self) -> dict[str, _Described]:
        return {"": self}

    def family(self, embeddings: tuple[str, ...] = (), transposed: tuple[str, ...] = ()) -> Family:
        return Family(self.config, embeddings, transposed)

    def __getitem__(self, name: str) -> Ref:
        return self.refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


@dataclass
class _Found:
    """An adapter at a path, with the digests of its files."""

    path: str
    adapter: Adapter
    used: bool = False

    @cached_property
    def digests(self) -> list[str]:
        return [row["blake3"] for row in adapter_inputs(self.adapter)]


@dataclass
class Recalled:
    """One record at work, beside the output it is of and the adapters that were given.

    `headers` and `parsed` are those of the base's files by name, `specs` its tensors, `loaded` the adapters with their strengths,
    none where nothing has to be computed. Raises FormatError for an output that is not the one the record was written with, or a
    file's name that leads out of its folder; MatchError for adapters that are not those that were merged.
    """

    merged: Checkpoint
    record: Record
    adapters: Sequence[str | Path]

    def __post_init__(self) -> None:
        self.table = self.record.table
        self.headers = {entry["name"]: b"".join(inflated(self.record.blob(f"header/{entry['name']}"))) for entry in self.table["files"]}
        self.parsed = {
            entry["name"]: parse_header(self.headers[entry["name"]], entry["bytes"] - 8 - len(self.headers[entry["name"]]))
            for entry in self.table["files"]
        }
        self.specs = {name: spec for entries, _ in self.parsed.values() for name, (spec, _) in entries.items()}
        self._check_files()
        self.loaded = self._adapters() if self._needed else []

    @property
    def _needed(self) -> bool:
        """Whether anything has to be computed: what is stored whole needs no adapter."""
        return any(name.startswith("differences/") for name in self.table["blobs"]) or bool(self.adapters)

    def _check_files(self) -> None:
        """The output has the files, tensors and headers that the merge wrote, and no file's name leads out of its folder."""
        for name in (*self.parsed, *(entry["path"] for entry in self.table["beside"]), *self.table["restored"]):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise FormatError("a file's name that leads out of its folder", file=self.record.path, found=repr(name))
        said = [entry["header_sha256"] for entry in self.table["files"]]
        for file, digest in zip(self.merged.files.values(), said, strict=False):
            if file.header_sha256 != digest:
                raise FormatError("its header is not the one that the merge wrote", file=file.path)
        if len(said) != len(self.merged.files) or self.table["single"] != self.merged.single:
            raise FormatError("not the files that the merge wrote", file=self.merged.path, found=", ".join(self.merged.files))

    def _adapters(self) -> list[tuple[Adapter, float]]:
        """The recorded adapters with their strengths: those given, or the ones at their paths, of the very bytes that were merged."""
        given = [_Found(item, self._load(item)) for item in (str(place_of(item)) for item in self.adapters)]
        found = [(self._recorded(entry, given), entry["strength"]) for entry in self.table["adapters"]]
        for item in given:
            if not item.used:
                raise MatchError("not an adapter that was merged", file=item.path, expected=_names(self.table["adapters"]))
        return found

    def _load(self, place: str) -> Adapter:
        return load(place, options=read_options(self.table["options"]))

    def _recorded(self, entry: Mapping[str, Any], given: list[_Found]) -> Adapter:
        said = [file["blake3"] for file in entry["files"]]
        for item in given:
            if item.digests == said:
                item.used = True
                return item.adapter
        remedy = "give the adapter as it was merged with --adapter"
        if not entry["path"].startswith(SCHEME) and not Path(entry["path"]).exists():
            raise MatchError("the adapter that was merged is not where it was", file=entry["path"], remedy=remedy)
        there = _Found(entry["path"], self._load(entry["path"]))
        if there.digests != said:
            files = (*there.adapter.files, *there.adapter.initial)
            other = [name_of(file) for file, one, two in zip(files, there.digests, said, strict=False) if one != two]
            found = f"other bytes in {', '.join(other) or 'its files'}"
            raise MatchError("not the adapter that was merged", file=entry["path"], found=found, remedy=remedy)
        return there.adapter

    @cached_property
    def plan(self) -> Plan:
        options = self.table["options"]
        refs = {name: self.merged[name] for name in self.specs}
        described = _Described(Path(self.table["path"]), self.specs, self._config(), refs)
        return make_plan(
            cast("Checkpoint", described), self.loaded, untie=options["untie"], renames=split_renames(options["rename"]),
            allow_unmatched=options["allow_unmatched"], transposed=tuple(options["transposed"]), embeddings=tuple(options["embedding"]),
        )  # fmt: skip

    def _config(self) -> dict[str, Any]:
        if self.merged.single:
            return dict(self.table["config"])
        if "file/config.json" in self.table["restored"]:
            return dict(json.loads(b"".join(inflated(self.record.blob("file/config.json")))))
        path = self.merged.folder / "config.json"
        return read_json(path) if path.is_file() else {}


def place_of(item: str | Path) -> str | Path:
    """An adapter's path, without its strength."""
    return cast("str | Path", split_strength(item)[0])  # no adapter in memory goes in, so none comes out


def _names(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(entry["path"] for entry in entries)
