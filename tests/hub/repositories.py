"""What a Hub holds: repositories with commits, the store of large files, users with tokens; in memory, without HTTP."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# what the Hub's default .gitattributes keeps outside git
LARGE = re.compile(r"\.(safetensors|bin|gguf|npz|pt|pth|ckpt|h5|onnx|zip|parquet|msgpack|model|pkl)$")
LICENSES = {"apache-2.0", "mit", "openrail", "creativeml-openrail-m", "cc-by-4.0", "cc-by-nc-4.0", "llama3.1", "gemma", "other", "unknown"}
_serial = itertools.count()


@dataclass
class User:
    """Who a token belongs to, and whether it may write (`role`, as whoami says it)."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class File:
    """A file of a commit: in git, or (large) in the store by its SHA-256."""

    data: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        """git's name of the blob: of the pointer, where the file is a large one."""
        data = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    """A state of all files, with what was said of it."""

    oid: str
    files: Mapping[str, File]
    message: str = ""
    parent: str | None = None


@dataclass
class Repository:
    """Commits and the names (branches, tags) that point at them."""

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, File], message: str = "a commit", revision: str = "main") -> str:
        """A new commit of exactly these files at the end of a branch; returns its hash."""
        parent = self.refs.get(revision)
        oid = hashlib.sha1(f"{self.id} {next(_serial)} {message} {sorted((k, f.etag) for k, f in files.items())}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), message, parent)
        self.refs[revision] = oid
        return oid

    def at(self, revision: str) -> Commit | None:
        """The commit a branch, tag or hash names."""
        return self.commits.get(self.refs.get(revision, revision))

    @property
    def files(self) -> Mapping[str, bytes]:
        """The bytes of all files at the end of main."""
        return {name: file.data for name, file in self.commits[self.refs["main"]].files.items()}

    def may_read(self, user: User | None) -> bool:
        return not self.private or (user is not None and user.owns(self.id))

    def may_download(self, user: User | None) -> bool:
        return not self.gated or (user is not None and (user.owns(self.id) or user.name in self.granted))


def files_of(given: Path | Mapping[str, bytes]) -> dict[str, File]:
    """Files from a folder or from bytes by name, large ones told by their endings."""
    if isinstance(given, Path):
        given = {str(path.relative_to(given)): path.read_bytes() for path in sorted(given.rglob("*")) if path.is_file()}
    return {name: File(data, LARGE.search(name) is not None) for name, data in given.items()}


def card_faults(content: str) -> list[str]:
    """What the Hub's check of a README's metadata refuses, for the fields that are written here."""
    import yaml

    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    if found is None:
        return []
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML metadata: {error}"]
    faults = []
    bases = metadata.get("base_model", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", base):
            faults.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if "license" in metadata and metadata["license"] not in LICENSES:
        faults.append('"license" must be one of [' + ", ".join(sorted(LICENSES)) + "]")
    return faults


def elements(data: bytes) -> dict[str, int]:
    """The elements of a safetensors file by dtype; nothing for bytes that are none."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except ValueError:
        return {}
    found = dict[str, int]()
    for name, row in header.items():
        if name != "__metadata__":
            found[row["dtype"]] = found.get(row["dtype"], 0) + math.prod(row["shape"])
    return found
