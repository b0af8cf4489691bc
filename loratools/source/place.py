"""What a path means: one on disk, or a repository on the Hub.

    user/repo    user/repo@revision    hf://user/repo    hf://user/repo@revision/folder/file.safetensors

What exists on disk wins, and only `hf://` may name a file or folder within a repository. A revision that has a slash
(refs/pr/1) is written with %2F where something follows it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from loratools.errors import FormatError, OptionError

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"  # the Hub's rule, less what it forbids anyway at the ends
_REPOSITORY = re.compile(rf"({_NAME}/{_NAME})(?:@([\w./%+-]+))?", re.ASCII)
_WITHIN = re.compile(rf"({_NAME}/{_NAME})(?:@([^/@]+))?(?:/(.*))?", re.ASCII)
# endings of files that people work with: a path that has one was meant as a path
_FILE = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|npz|gguf|json)")


@dataclass(frozen=True)
class Place:
    """A repository of models at a revision, and a file or folder within it ("" for all of it).

    >>> print(Place("ada/style", "v1", "unet"))
    hf://ada/style@v1/unet
    """

    repo: str
    revision: str | None = None
    inner: str = ""

    def __str__(self) -> str:
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}/{self.inner}" if self.inner else f"{self.repo}{at}"


def place_of(path: str | Path) -> Path | Place:
    """The path, if something is there or it can be nothing else, else the repository it names.

    Raises FormatError where there is nothing, naming both readings if there are two; OptionError for an hf:// path that names
    no repository.
    """
    text = os.fspath(path)
    if isinstance(path, str) and text.startswith(SCHEME):
        return _within(text)
    if os.path.lexists(text):
        return Path(path)
    found = _REPOSITORY.fullmatch(text)
    if found is None or _FILE.fullmatch(text) or _dotted(text):
        raise FormatError("no such file or folder", file=path)
    return Place(found[1], unquote(found[2]) if found[2] else None)


def _within(text: str) -> Place:
    found = _WITHIN.fullmatch(text.removeprefix(SCHEME).removesuffix("/"))
    inner = (found[3] or "").strip("/") if found else ""
    if found is None or any(part in ("", ".", "..") for part in inner.split("/") if inner) or _dotted(found[1]):
        expected = "hf://user/repo, hf://user/repo/file or hf://user/repo@revision/file"
        raise OptionError("not a path on the Hub", file=text, expected=expected)
    return Place(found[1], unquote(found[2]) if found[2] else None, inner)


def _dotted(text: str) -> bool:
    """What no repository's name holds: the Hub forbids '--' and '..'."""
    return "--" in text.partition("@")[0] or ".." in text
