"""A repository on the Hub that is written: what is there, what a model's card says, and one commit of files.

The token is huggingface_hub's own affair, from HF_TOKEN or `hf auth login`: it is neither asked for nor kept, and in no message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

from loratools.errors import FormatError, LoratoolsError, SourceError
from loratools.source.remote import again, transport, without_token

README = "README.md"
LICENSE = ("license", "license_name", "license_link")
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class State:
    """A repository that is there: its last commit, its card, its files' names."""

    sha: str | None
    private: bool
    card: str | None
    files: tuple[str, ...] = ()


class Hub:
    """What is asked of the Hub for one repository; on a dry run what it refuses is a note, and nothing is sent."""

    def __init__(self, repo: str, dry_run: bool, notes: list[str]) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.constants import ENDPOINT

        self.api, self.repo, self.dry_run, self.notes, self.url = HfApi(), repo, dry_run, notes, f"{ENDPOINT}/{repo}"

    def start(self) -> None:
        """Raise for what would stop the upload at its end."""
        from huggingface_hub import get_token
        from huggingface_hub.constants import is_offline_mode

        if self.dry_run:
            self.notes += [] if get_token() else [f"not logged in: {LOGIN} before pushing"]
        elif is_offline_mode():
            raise SourceError("HF_HUB_OFFLINE is set", file=self.repo, remedy="unset it, or see what would go up with --dry-run")
        elif not get_token():
            raise SourceError("not logged in", file=self.repo, remedy=LOGIN)

    def state(self) -> State | None:
        """The repository as it is, None where there is none, or none that the token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._asking(self.repo):
            try:
                info = again(lambda: self.api.model_info(self.repo))
            except RepositoryNotFoundError:
                return None
            names = tuple(file.rfilename for file in info.siblings or ())
            text = self._readme(self.repo, info)
            return State(info.sha, bool(info.private), None if text is None else _strict(text), names)
        return None

    def of_model(self, model: str) -> tuple[dict[str, str], int | None, bool]:
        """The licence on a model's card, its parameters as the Hub counted them, and whether the Hub knows it."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._asking(model):
            try:
                info = again(lambda: self.api.model_info(model))
                license = licensed(front_of(info.card_data)) if info.card_data is not None else {}
                if not license and info.card_data is None and (text := self._readme(model, info)) is not None:
                    license = licensed(front(text.decode("utf-8", "replace")))
                return license, info.safetensors.total if info.safetensors is not None else None, True
            except RepositoryNotFoundError:
                self.notes.append(f"the Hub has no model {model} that this token may see")
        return {}, None, False

    def _readme(self, model: str, info: Any) -> bytes | None:
        from huggingface_hub.errors import GatedRepoError

        if not any(file.rfilename == README for file in info.siblings or ()):
            return None
        try:
            path = again(lambda: self.api.hf_hub_download(model, README, revision=info.sha))
        except GatedRepoError:
            self.notes.append(f"{model} is gated, and its card cannot be read with this token")
            return None
        return Path(path).read_bytes()

    def publish(self, files: Mapping[str, Path | bytes], card: str, message: str, private: bool, there: State | None) -> str:
        """One commit of all files; the repository is created first. Returns the commit."""
        from huggingface_hub import CommitOperationAdd, ModelCard

        with refusals(self.repo):
            try:
                again(ModelCard(card, ignore_metadata_errors=True).validate)
            except ValueError as error:
                raise FormatError("the Hub refuses the card", file=README, found=line(error), remedy="mend its front matter") from None
            if there is None:
                again(lambda: self.api.create_repo(self.repo, private=private or None, exist_ok=True))
            adds = [CommitOperationAdd(name, data if isinstance(data, bytes) else str(data)) for name, data in sorted(files.items())]
            parent = there.sha if there is not None else None
            # a commit that failed in another way may have come into being, and a second one would not be told from somebody else's
            made = again(lambda: self.api.create_commit(self.repo, adds, commit_message=message, parent_commit=parent), only=(429,))
            return str(made.oid)

    @contextmanager
    def _asking(self, place: str) -> Iterator[None]:
        """What the Hub refuses is a SourceError, or on a dry run a note."""
        try:
            with refusals(place):
                yield
        except SourceError as error:
            if not self.dry_run:
                raise
            self.notes.append(f"not asked of the Hub: {error}")


@contextmanager
def refusals(repo: str) -> Iterator[None]:
    """Let whatever goes wrong between here and the Hub be one SourceError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    http = transport()
    try:
        try:
            yield
        except RuntimeError as error:  # huggingface_hub's around an upload that failed
            if not isinstance(error.__cause__, HfHubHTTPError | http.HTTPError | OSError):
                raise SourceError("the upload stopped", file=repo, found=line(error), remedy=_AGAIN) from None
            raise error.__cause__ from None
    except LoratoolsError:
        raise
    except OfflineModeIsEnabled:
        raise SourceError("HF_HUB_OFFLINE is set", file=repo, remedy="unset it") from None
    except HfHubHTTPError as error:
        raise _refused(error, repo) from None
    except (http.HTTPError, OSError) as error:
        from huggingface_hub.constants import ENDPOINT

        found = f"{ENDPOINT} ({line(error)})"
        raise SourceError("the Hub cannot be reached", file=repo, found=found, remedy=f"is there a network? {_AGAIN}") from None


def _strict(text: bytes) -> str:
    """A card that is kept, whose prose must not be changed by being read."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise FormatError("the repository's card is no UTF-8", file=README, remedy="save it as UTF-8, or delete it there") from None


_AGAIN = "run it again: large files that arrived are not sent twice"


def _refused(error: Any, repo: str) -> SourceError:
    """What the Hub's refusal means for the user."""
    from huggingface_hub.constants import ENDPOINT

    status, said = error.response.status_code, line(getattr(error, "server_message", None) or "")
    if status == 401:
        return SourceError("the Hub does not accept the token (401)", file=repo, remedy=f"{LOGIN} of a valid one")
    if status == 403:
        remedy = f"use a token that may write to it, from {ENDPOINT}/settings/tokens, or another USER/"
        return SourceError("the token has no right to write there (403)", file=repo, found=said or None, remedy=remedy)
    if status == 404:
        return SourceError("no such repository, or none that the token may see (404)", file=repo, remedy="check the name and the token")
    if status == 412:
        return SourceError("somebody else has committed meanwhile (412)", file=repo, remedy="run it again")
    if status == 429:
        return SourceError("the Hub wants fewer requests (429)", file=repo, remedy=f"wait some minutes; {_AGAIN}")
    if status >= 500:
        return SourceError(f"the Hub fails ({status})", file=repo, remedy=f"try later; {_AGAIN}")
    return SourceError(f"the Hub refuses ({status})", file=repo, found=said or None)


def line(error: object) -> str:
    """An error's text on one short line, without the token."""
    text = str(error)
    try:
        text = "; ".join(str(row["message"]) for row in json.loads(text.partition("\n")[2] or text)["errors"])
    except (ValueError, TypeError, KeyError):
        text = " ".join(text.split())
    return without_token(text)[:300]


@contextmanager
def quiet(progress: bool) -> Iterator[None]:
    """Let huggingface_hub draw its bars or not, and keep its log from the terminal: errors are told here."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity(CRITICAL)
    try:
        if bars and not progress:
            disable_progress_bars()
        yield
    finally:
        logging.set_verbosity(level)
        if bars and not progress:
            enable_progress_bars()


# -- front matter


def front(text: str) -> Mapping[str, Any]:
    """A card's front matter as huggingface_hub reads it. Raises FormatError."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = text.removeprefix("\ufeff")
    if REGEX_YAML_BLOCK.search(text) is None:
        return {}
    try:
        return front_of(ModelCard(text, ignore_metadata_errors=True).data)
    except Exception as error:  # yaml's own, or ValueError for what is no table
        fact, remedy = "front matter that is no YAML table", "mend it between its --- lines"
        raise FormatError(fact, file=README, found=line(error), remedy=remedy) from None


def front_of(data: Any) -> dict[str, Any]:
    """Front matter that huggingface_hub has read, without keys that say nothing."""
    return dict(data.to_dict())


def licensed(front: Mapping[str, Any]) -> dict[str, str]:
    """What front matter says of the licence."""
    return {key: value for key in LICENSE if isinstance(value := front.get(key), str) and value}
