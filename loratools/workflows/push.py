"""push: an adapter or a merged model on the Hugging Face Hub, in one commit with its receipt and a card.

spec/push.md tells what goes up and what is asked of the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from loratools.errors import FormatError, LoratoolsError, OptionError, UsageError
from loratools.formats.reading import Reading, reads
from loratools.pipeline import open_checkpoint
from loratools.sidefiles import WEIGHTS
from loratools.source.publish import Hub, front, licensed, quiet
from loratools.workflows import _loading, _provenance
from loratools.workflows._checking import findings
from loratools.workflows._outgoing import CARD, Outgoing, outgoing
from loratools.workflows._recorded import receipt_of
from loratools.workflows.card import Facts, metadata, written

_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_TEXT = 1 << 27  # files of more bytes are no text that a token was pasted into


@reads
def push(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    dry_run: bool = False,
    progress: bool = False,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Publish an adapter, or a merged model's folder, as `user/repo` on the Hub; returns what went up, what stayed and where.

    Weights, config, receipt and a card (README.md) go up in one commit, and the repository is created if there is none, `private` if
    asked. `base_model` is the base's id where the files name none, or a local path. `dry_run` sends nothing, and works without the
    Hub. Large files that an earlier, interrupted run sent are not sent again. `progress` lets huggingface_hub draw its bars.

    Raises, before anything is sent, NonFiniteError for inf and nan, FormatError for an adapter that changes nothing, one that names no
    base, files that are not those of their receipt and a card that the Hub would refuse, UnsupportedError for what is neither an
    adapter nor a merge, and what reading raises; SourceError for what the Hub refuses.

    >>> push("adapter/", "ada/style", dry_run=True)["files"]  # doctest: +SKIP
    [{'path': 'README.md', 'bytes': 1730}, {'path': 'adapter_config.json', 'bytes': 641}, …]
    """
    if not _REPOSITORY.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git") or len(repo) > 96:
        raise UsageError("REPO", found=repo, expected="user/repo, of letters, digits, '-', '_' and '.'")
    found = outgoing(Path(path), base_model, reading)
    with quiet(progress):
        hub = Hub(repo, dry_run, found.notes)
        hub.start()
        there = hub.state()
        more = sorted(name for name in (there.files if there is not None else ()) if WEIGHTS.fullmatch(name) and name not in found.files)
        if more:
            found.notes.append(f"the repository has other weights, which stay there: {', '.join(more[:3])}")
        if there is not None and private and not there.private:
            remedy = f"make it private at {hub.url}/settings, or leave out --private"
            raise OptionError("the repository exists already, and is public", file=repo, remedy=remedy)
        card = _card(found, hub, there.card if there is not None else None, base_model, reading)
        files = {**found.files, CARD: card.encode()}
        if found.recorded is not None and found.receipt is not None:
            files[found.recorded] = receipt_of(found.receipt, files) or files[found.recorded]
        _check_tokens(files)
        said = message or f"loratools push: {found.relation} of {found.bases[0]}"
        commit = None if dry_run else hub.publish(files, card, said, private, there)
    return {
        "repo": repo, "url": hub.url, "commit": commit, "dry_run": dry_run, "private": there.private if there is not None else private,
        "base_models": found.bases, "license": front(card).get("license"), "card": card,
        "files": [{"path": name, "bytes": _size(data)} for name, data in sorted(files.items())], "left": found.left, "notes": found.notes,
    }  # fmt: skip


def _size(data: Path | bytes) -> int:
    return len(data) if isinstance(data, bytes) else data.stat().st_size


# -- the card


def _card(found: Outgoing, hub: Hub, remote: str | None, named: str | None, reading: Reading) -> str:
    """The card's text, known to be one that huggingface_hub reads: the local one made anew, or the one that is there."""
    existing = found.card if found.card is not None else remote
    license, parameters = _of_base(found, hub)
    asked: tuple[str, ...] = ()
    if found.adapter is not None:
        task = (found.config or {}).get("task_type")
        asked = _loading.runtimes(found.adapter.format, _loading.is_text(list(found.adapter), task))
    facts = Facts(
        repo=hub.repo, bases=found.bases, relation=found.relation, report=found.report, file=found.file, named=named is not None,
        license=license, base_parameters=parameters, config=found.config, receipt=found.receipt,
        findings={name: findings(found.adapter, name, **reading) for name in asked if found.adapter is not None},
    )  # fmt: skip
    kept = front(existing) if existing is not None else {}
    text = written(facts, existing, kept)
    now = front(text)
    lost = [key for key, value in kept.items() if key not in metadata(facts, kept) and now.get(key) != value]
    if lost:
        raise FormatError("front matter that would lose a key", file=CARD, found=str(lost[0]), remedy="write it as key: value on a line")
    if license.get("license") and kept.get("license") not in (None, license["license"]):
        found.notes.append(f"the card keeps its licence {kept['license']}; the base's is {license['license']}")
    if named is None and kept.get("base_model") not in (None, found.bases[0]) and now["base_model"] == kept["base_model"]:
        found.notes.append(f"the card keeps its base_model {kept['base_model']}; the files say {found.bases[0]}")
    return text


def _of_base(found: Outgoing, hub: Hub) -> tuple[dict[str, str], int | None]:
    """The licence that the base's card tells, on the Hub or else on disk, and how many parameters the base has, if that is known."""
    license, parameters, known = hub.of_model(found.bases[0])
    stated = (_provenance.local_base(found.receipt or {}), found.stated)
    local = next((Path(one) for one in stated if one is not None and Path(one).is_dir()), None)
    if not known:
        beside = (local / CARD).read_text(encoding="utf-8", errors="replace") if local is not None and (local / CARD).is_file() else None
        license = licensed(front(found.base_card or beside or ""))
    if not license:
        found.notes.append(f"no card tells the licence of {found.bases[0]}: this one says other")
    if local is not None and parameters is None:
        try:
            parameters = sum(spec.numel for spec in open_checkpoint(local).specs.values())
        except LoratoolsError:
            parameters = None
    return license, parameters


# -- what never goes up


def _check_tokens(files: Mapping[str, Path | bytes]) -> None:
    """Raise for a text that holds a token of the Hub: the one in use, or anything that looks like one."""
    from huggingface_hub import get_token

    own = (get_token() or "").encode()
    for name, data in files.items():
        if name.endswith((".safetensors", ".bin", ".gguf")) or _size(data) > _TEXT:
            continue
        text = data if isinstance(data, bytes) else data.read_bytes()
        if (own and own in text) or _TOKEN.search(text):
            raise FormatError("holds a token of the Hub", file=name, remedy="take it out, and revoke it if it was published before")
