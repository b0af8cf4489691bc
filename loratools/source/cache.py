"""The Hub's cache on this machine: where huggingface_hub keeps a repository, and what it has of one without asking."""

from __future__ import annotations

import re
from pathlib import Path

from loratools.errors import SourceError
from loratools.source import handles
from loratools.source.place import Place

COMMIT = re.compile(r"[0-9a-f]{40}")


def cached(place: Place) -> Path | None:
    """Where the cache has a repository, if HF_HUB_OFFLINE says that it must do. Raises SourceError where it has not."""
    from huggingface_hub.constants import is_offline_mode

    if not is_offline_mode():
        return None
    storage, revision = storage_of(place), place.revision or "main"
    ref = storage / "refs" / revision
    commit = revision if COMMIT.fullmatch(revision) else ref.read_text().strip() if ref.is_file() else ""
    snapshot = storage / "snapshots" / commit
    if not commit or not (snapshot / place.inner).exists():
        remedy = "unset it, or download it before"
        raise SourceError("no such file or folder here, not in the Hub's cache, and HF_HUB_OFFLINE is set", file=str(place), remedy=remedy)
    handles.call(snapshot, f"{place.repo}@{commit}")
    return snapshot / place.inner


def storage_of(place: Place) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=place.repo, repo_type="model")
