"""Where bytes come from: a file on disk, or a repository on the Hugging Face Hub, read by range or downloaded into its cache.

    local(path, choose)     a path as one on disk, what is needed of a repository downloaded
    headers(path)           a path to read headers at; of a repository a folder of its files' names, read by range when opened

Only `cache.py`, `remote.py`, `download.py` and `publish.py` import huggingface_hub, when a path is a repository's. spec/hub.md tells
what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from loratools.source.place import Place, place_of

Choose: TypeAlias = Callable[[Path], Iterable[Path]]


def local(path: str | Path, choose: Choose) -> Path:
    """The path on disk: itself, or where the Hub's cache keeps a repository's files.

    `choose` is shown the repository as a folder of empty files (or the file within it that was named), JSON readable, and returns
    those that are needed. Raises FormatError for what is neither a path nor a repository, SourceError for what the Hub refuses.
    """
    place = place_of(path)
    if not isinstance(place, Place):
        return place
    from loratools.source.download import downloaded

    return downloaded(place, choose)


@contextmanager
def headers(path: str | Path) -> Iterator[Path]:
    """The path, or a repository's folder of placeholders for as long as the block lasts: files of it are read by range.

    Faults that name a placeholder leave the block naming the repository's file.
    """
    place = place_of(path)
    if not isinstance(place, Place):
        yield place
        return
    from loratools.source.view import seen

    with seen(place) as view:
        yield view
