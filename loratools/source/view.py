"""A repository as a folder of placeholders: its files' names with nothing in them, whose headers are read by range.

All that finds and opens files on disk works on it unchanged. A placeholder that were opened past `handles` is an empty file, so that
nothing half-read can be taken for the whole.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loratools.errors import Faults, FormatError, LoratoolsError, SourceError
from loratools.source import handles
from loratools.source.cache import cached
from loratools.source.place import Place
from loratools.source.remote import Repository, refusals

AHEAD = 1 << 16  # bytes read of a file whose header's length is not known, and so the most that are read in vain
REQUESTS = 3  # for an adapter: no more are made for the sake of small tensors alone
SMALL = 8  # elements
HEADER_LIMIT = 100_000_000
_LEAST = len('"":{"dtype":"U8","shape":[],"data_offsets":[0,0]},')  # that a header takes for a tensor, besides its name
TEXT_LIMIT = 1 << 27  # of a file that is read whole, such as a config or an index


_OPEN: dict[Place, Path] = {}  # views that a block further out holds: what they fetched is not asked for again


@contextmanager
def seen(place: Place) -> Iterator[Path]:
    """The repository's files, or those of the folder or the one file within it, as paths; from its cache where HF_HUB_OFFLINE is set."""
    if (kept := cached(place)) is not None or (kept := _OPEN.get(place)) is not None:
        yield kept
        return
    with laid_out(Repository(place)) as root:
        _OPEN[place] = root / place.inner
        try:
            yield root / place.inner
        finally:
            del _OPEN[place]


@contextmanager
def laid_out(repository: Repository) -> Iterator[Path]:
    """The folder of placeholders, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
        root = Path(folder).resolve() / repository.place.repo.rpartition("/")[2]
        root.mkdir()
        files: dict[str, handles.Placeholder] = {}
        hints = Hints(repository)
        for name in repository.files:
            path = root / name
            if root in path.parents and ".." not in path.parts:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
                files[str(path)] = Remote(repository, name, hints)
        inner = repository.place.inner
        if inner and not (root / inner).exists():
            with refusals(repository.place):
                raise SourceError("the repository has no such file or folder", remedy=f"it has {_some(repository.files)}")
        handles.register(files)
        try:
            yield root
        except LoratoolsError as error:
            raise _renamed(error, root, repository) from None
        finally:
            handles.forget(files)


def _some(names: Mapping[str, object]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f", … ({len(shown)} in all)" if len(shown) > 4 else "")


def _renamed(error: LoratoolsError, root: Path, repository: Repository) -> LoratoolsError:
    """The fault under the names of the repository's files."""
    for one in error.errors if isinstance(error, Faults) else (error,):
        path = Path(one.file) if one.file is not None else None
        if path is not None and (path == root or root in path.parents):
            inner = path.relative_to(root).as_posix()
            one.file = str(repository.shown("" if inner == "." else inner))
    return error


class Remote(handles.Placeholder):
    """A file of a repository: small ones are read whole, once; of the others the header alone."""

    def __init__(self, repository: Repository, name: str, hints: Hints) -> None:
        self.repository, self.name, self.hints = repository, name, hints
        self.size = repository.files[name].size
        self._text: bytes | None = None
        self._header: Ranged | None = None

    def whole(self) -> bytes:
        if self.size > TEXT_LIMIT:
            raise FormatError("too long for a file of text", file=str(self.repository.shown(self.name)), found=f"{self.size} bytes")
        if self._text is None:
            self._text = self.repository.read(self.name, 0, self.size)
            if self.name.endswith(".json") and ".index" in self.name:
                self.hints.index(self.name, self._text)
        return self._text

    def header(self) -> handles.Source:
        if self._header is None:
            self._header = Ranged(self.repository, self.name, self.hints.length(self.name))
        return self._header


class Ranged(handles.Source):
    """The beginning of a file: what a header takes, fetched by one request, or two where it is longer than could be known."""

    def __init__(self, repository: Repository, name: str, ahead: int) -> None:
        self.repository, self.name, self.size = repository, name, repository.files[name].size
        self._data = repository.read(name, 0, ahead)
        self._apart = (0, b"")  # small tensors that lie beyond, and where
        self._end = self.size if len(self._data) < 8 else min(self.size, 8 + struct.unpack("<Q", self._data[:8])[0])

    def readinto(self, buffer: memoryview, offset: int) -> int:
        stop = min(offset + len(buffer), self.size)
        if stop > len(self._data) and stop <= self._end:
            self._data += self.repository.read(self.name, len(self._data), self._end + AHEAD)
        start, data = 0, self._data
        if stop > len(data):
            start, data = self._small()
        if not start <= offset or stop > start + len(data):
            fact = "its data are not read from afar"
            raise handles.NotFetched(fact, file=str(self.repository.shown(self.name)), remedy="--values downloads it")
        count = max(stop - offset, 0)
        buffer[:count] = data[offset - start : stop - start]
        return count

    def _small(self) -> tuple[int, bytes]:
        """The tensors of few elements that lie beyond, such as alphas: by one request, if one is left and they lie close."""
        if not self._apart[1] and self.repository.requests < REQUESTS:
            table = json.loads(self._data[8 : self._end])
            spans = [
                tuple(self._end + place for place in entry["data_offsets"])
                for name, entry in table.items()
                if name != "__metadata__" and math.prod(entry["shape"]) <= SMALL
            ]
            beyond = [span for span in spans if span[1] > len(self._data)]
            first, last = min(span[0] for span in beyond), max(span[1] for span in beyond)
            if last - first <= self._end + AHEAD - len(self._data):
                self._apart = first, self.repository.read(self.name, first, last)
        return self._apart


class Hints:
    """How many bytes to fetch first of a file, so that its header comes with them: never more than 64 kB too many."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.shards: dict[str, list[str]] = {}  # names of tensors by shard, of the indices that were read

    def length(self, name: str) -> int:
        return max(AHEAD, self._counted(name), AHEAD + sum(len(key) + _LEAST for key in self.shards.get(name, ())))

    def index(self, name: str, text: bytes) -> None:
        """Take note of an index, if that is what the text is; what is wrong with it is told by who reads it."""
        try:
            for key, shard in json.loads(text)["weight_map"].items():
                self.shards.setdefault(name.rpartition("/")[0] + "/" * ("/" in name) + shard, []).append(key)
        except (ValueError, TypeError, KeyError, AttributeError):
            self.shards.clear()

    def _counted(self, name: str) -> int:
        """The file's size less its tensors', where it is the only one of weights and the Hub counted them."""
        weights = [file for file in self.repository.files if file.endswith(".safetensors")]
        size = self.repository.files[name].size
        found = [(re.fullmatch(r"[A-Z]+(\d+)(_.*)?", code), count) for code, count in self.repository.parameters.items()]
        if weights != [name] or not found or not all(code for code, _ in found):
            return 0
        rest = size - sum(int(code[1]) * count for code, count in found if code) // 8
        return rest if 8 < rest <= min(size, HEADER_LIMIT) else 0
