"""Files of a repository in the Hub's cache: fetched one by one, gone on with where a run was cut off, checked before they count.

The cache is huggingface_hub's own: a blob by its SHA-256 (git's name of it, for a small file), a link to it in the commit's
snapshot. A blob comes into being by a rename, after its digest was found to be the Hub's; what is not whole yet lies beside
under another name, and the next run goes on from its end. Weights come last, so that a snapshot that has them has the rest.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from loratools.errors import SourceError
from loratools.source import handles, watch
from loratools.source.cache import COMMIT, cached, storage_of
from loratools.source.place import Place
from loratools.source.remote import PAUSES, Entry, Repository, in_passing, refusals, transport, waiting
from loratools.source.view import laid_out

_WEIGHTS = re.compile(r".+\.(safetensors|bin|pt|pth|ckpt|npz|gguf)")
_BLOCK = 1 << 20


def downloaded(place: Place, choose: Callable[[Path], Iterable[Path]]) -> Path:
    """Where the files of a repository that `choose` picks lie on disk, all of them whole. Raises SourceError."""
    if (kept := cached(place)) is not None:
        return kept
    repository = Repository(place)
    with laid_out(repository) as root:
        names = [path.relative_to(root).as_posix() for path in choose(root / place.inner)]
    storage = storage_of(place)
    snapshot = storage / "snapshots" / repository.commit
    for name in sorted(names, key=lambda name: (_WEIGHTS.fullmatch(name) is not None, name)):
        with refusals(repository.shown(name)):
            _fetch(repository, name, storage, snapshot / name)
    revision = place.revision or "main"
    if not COMMIT.fullmatch(revision):
        (storage / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (storage / "refs" / revision).write_text(repository.commit)
    handles.call(snapshot, repository.name, sorted(repository.files.keys() - set(names)))
    return snapshot / place.inner


def _fetch(repository: Repository, name: str, storage: Path, pointer: Path) -> None:
    """One file into the cache, unless it is there whole: in its full size, with the Hub's digest."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    entry = repository.files[name]
    blob = storage / "blobs" / entry.etag
    for path in (pointer.resolve(), blob):
        if _is_whole(path, entry) and not _is_sound(path, entry):
            path.unlink()
    if _is_whole(pointer, entry):
        return
    if not _is_whole(blob, entry) and entry.size <= MAX_HTTP_DOWNLOAD_SIZE:
        blob.parent.mkdir(parents=True, exist_ok=True)
        _into(blob, repository, name, entry)
    # the client makes the link in the way of its cache; files beyond what the Hub sends over plain HTTP it fetches itself
    hf_hub_download(repository.place.repo, name, revision=repository.commit)
    if not _is_whole(pointer, entry):
        raise SourceError("not in the cache in its full size", found=str(pointer), remedy="delete it there")
    if entry.size > MAX_HTTP_DOWNLOAD_SIZE and not _is_sound(pointer.resolve(), entry):
        _refuse(pointer.resolve(), entry, "other bytes")


def _is_whole(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size


def _is_sound(path: Path, entry: Entry) -> bool:
    """Whether a file has the Hub's digest; one that was found to is not read again as long as its time stays the same."""
    mark, time_of = path.with_name(f"{path.name}.loratools.checked"), str(path.stat().st_mtime_ns)
    if mark.is_file() and mark.read_text() == time_of:
        return True
    digest = _empty(entry)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != entry.etag:
        return False
    _mark(path)
    return True


def _mark(path: Path) -> None:
    if path.parent.name == "blobs":  # never in a snapshot, whose files are copied
        with suppress(OSError):  # a cache that others own
            path.with_name(f"{path.name}.loratools.checked").write_text(str(path.stat().st_mtime_ns))


def _empty(entry: Entry) -> Any:
    return hashlib.sha256() if entry.sha256 else hashlib.sha1(b"blob %d\0" % entry.size)


def _into(blob: Path, repository: Repository, name: str, entry: Entry) -> None:
    """Fetch a blob's bytes, from where an earlier run stopped; it appears once its digest was found to be right."""
    partial = blob.with_name(f"{blob.name}.loratools.incomplete")
    with partial.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another run of ours may be at it, and is waited for
        if _is_whole(blob, entry):
            return
        growing = _Growing(file, entry)
        with watch.bar(name, entry.size) as told:
            told(growing.size)
            _fill(growing, repository, name, told)
        if (found := growing.digest.hexdigest()) != entry.etag:
            _refuse(partial, entry, found)
        file.flush()
        os.fsync(file.fileno())
        if partial.exists():  # else the run that was waited for has put it in place
            partial.replace(blob)
        _mark(blob)


class _Growing:
    """A blob that is not whole yet, and the digest of what there is of it."""

    def __init__(self, file: BinaryIO, entry: Entry) -> None:
        self.file, self.entry = file, entry
        file.seek(0)
        self.size, self.digest = 0, _empty(entry)
        while block := file.read(_BLOCK):
            self.size += len(block)
            self.digest.update(block)
        if self.size > entry.size:
            self.clear()

    def clear(self) -> None:
        self.file.truncate(0)
        self.size, self.digest = 0, _empty(self.entry)

    def add(self, block: bytes) -> None:
        if self.size + len(block) > self.entry.size:
            self.clear()
            raise SourceError("the Hub sent more of it than it said", expected=f"{self.entry.size} bytes", remedy="run it again")
        self.file.write(block)
        self.size += len(block)
        self.digest.update(block)


def _fill(growing: _Growing, repository: Repository, name: str, told: Callable[[int], None]) -> None:
    """Append what is missing; a connection that is lost is taken up again, as long as it does not fail too often for nothing."""
    from huggingface_hub.errors import HfHubHTTPError

    vain = 0
    while growing.size < growing.entry.size:
        before, lost = growing.size, SourceError("the Hub sent less of it than it said", expected=f"{growing.entry.size} bytes")
        failed: Exception = lost
        try:
            with repository.stream(name, before) as (first, blocks):
                if first != before:  # the server took no notice of the range
                    growing.clear()
                for block in blocks:
                    growing.add(block)
                    told(growing.size)
        except (transport().TransportError, HfHubHTTPError) as error:
            failed = error
        vain = 0 if growing.size > before else vain + 1
        if growing.size < growing.entry.size and (vain > len(PAUSES) or not in_passing(failed)):
            lost.found = f"{growing.size} bytes"
            raise failed
        if vain:
            time.sleep(waiting(failed, PAUSES[vain - 1]))


def _refuse(path: Path, entry: Entry, found: str) -> NoReturn:
    path.unlink(missing_ok=True)
    fact = "not the bytes that the Hub has a digest of, and deleted"
    raise SourceError(fact, found=found, expected=entry.etag, remedy="run it again")
