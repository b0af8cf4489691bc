"""A repository on the Hub: what files it has at a commit, their bytes by range, and each refusal as one line that says what to do.

Requests go through huggingface_hub's own session, URLs and headers, so tokens, proxies, HF_ENDPOINT and HF_HUB_OFFLINE work as its
client's do: a token is sent to the Hub alone, for the session drops it where it is sent on to another host.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from loratools.errors import LoratoolsError, SourceError
from loratools.source.place import Place

T = TypeVar("T")
PAUSES = (0.5, 1.0, 2.0)  # seconds before a request that failed in passing is made again
PATIENCE = 60.0  # the longest that a Retry-After is heeded
_PASSING = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Entry:
    """A file of a commit: its size, git's name of its blob, and its SHA-256 if it is a large one."""

    size: int
    blob: str
    sha256: str | None

    @property
    def etag(self) -> str:
        """What the Hub's cache calls it."""
        return self.sha256 or self.blob


class Repository:
    """A repository at a commit, listed by one request. Raises SourceError, naming the place as the user did."""

    def __init__(self, place: Place) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

        self.place = place
        self.requests = 1  # besides those that were only sent on, or failed in passing
        with refusals(place):
            info = again(lambda: HfApi().model_info(place.repo, revision=place.revision, files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT))
        if info.sha is None:
            raise SourceError("the Hub does not tell its commit", file=str(place))
        self.commit: str = info.sha
        self.files: Mapping[str, Entry] = {
            file.rfilename: Entry(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        }
        # of the weights that the Hub itself looked at: elements by dtype
        self.parameters: Mapping[str, int] = info.safetensors.parameters if info.safetensors else {}

    @property
    def name(self) -> str:
        """What it is called in receipts: the repository and the commit, which never changes."""
        return f"{self.place.repo}@{self.commit}"

    def shown(self, file: str) -> Place:
        """A file's place as messages name it."""
        return Place(self.place.repo, self.place.revision, file)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file, by one request; fewer where it ends before. Raises SourceError."""
        stop = min(stop, self.files[file].size)
        if stop <= start:
            return b""
        self.requests += 1
        with refusals(self.shown(file)):
            return again(lambda: self._read(file, start, stop))

    def _read(self, file: str, start: int, stop: int) -> bytes:
        data = bytearray()
        with self.stream(file, start, stop) as (first, blocks):
            for block in blocks:
                data += block
                if len(data) >= stop - first:  # where a range is ignored, all of the file would come
                    break
        data = data[start - first : stop - first]
        if len(data) != stop - start:
            raise SourceError("the Hub sent less of it than it said", found=f"{len(data)} bytes", expected=stop - start)
        return bytes(data)

    @contextmanager
    def stream(self, file: str, start: int, stop: int | None = None) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes of a file from `start` on (to `stop`) as they come, after the position they begin at: 0 where ranges are ignored."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self.place.repo, file, revision=self.commit)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        with get_session().stream("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            if response.status_code == 206 and _first(response) != start:
                told = response.headers.get("Content-Range")
                raise SourceError("the Hub sent another part than it was asked for", found=told, expected=headers.get("Range"))
            yield (start if response.status_code == 206 else 0), response.iter_raw()


def _first(response: Any) -> int | None:
    """Where the part begins that an answer of 206 holds."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found is not None else None


def transport() -> Any:
    """The HTTP library that huggingface_hub is built on (httpx, or httpx2 since 2.0), for its exceptions."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    return importlib.import_module(HTTPError.__module__.partition(".")[0])


def again(call: Callable[[], T], only: tuple[int, ...] | None = None) -> T:
    """What the call returns, tried a few times more where it fails in passing; `only` for answers of these statuses, if given."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if not in_passing(error) or (only is not None and status not in only):
                raise
            time.sleep(waiting(error, pause))
    return call()


def in_passing(error: Exception) -> bool:
    """Whether a request may well succeed in a moment: too many requests, an error of the server, a connection that was lost."""
    from huggingface_hub.errors import HfHubHTTPError

    http = transport()
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    return isinstance(error, http.TransportError | SourceError) and not isinstance(error, http.ConnectError)


def waiting(error: Exception, otherwise: float) -> float:
    """Seconds to wait: those that a Retry-After asks for, if it does not ask for too many."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if re.fullmatch(r"\d+", value) and float(value) <= PATIENCE else otherwise


@contextmanager
def refusals(place: Place) -> Iterator[None]:
    """Let whatever goes wrong between here and the Hub be one SourceError that names the place and says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    http = transport()

    try:
        yield
    except LoratoolsError as error:
        raise error.at(file=str(place)) from None
    except OfflineModeIsEnabled:
        raise SourceError("HF_HUB_OFFLINE is set", file=str(place), remedy="unset it, or download it before") from None
    except HfHubHTTPError as error:
        raise refused(error, place) from None
    except http.TimeoutException:
        fact = "the Hub does not answer in time"
        raise SourceError(fact, file=str(place), found=_endpoint(), remedy="try again, or raise HF_HUB_DOWNLOAD_TIMEOUT") from None
    except (http.HTTPError, ConnectionError) as error:
        fact, remedy = "the Hub cannot be reached", "is there a network? HF_HUB_OFFLINE=1 uses what is in the cache"
        raise SourceError(fact, file=str(place), found=without_token(f"{_endpoint()} ({error})"), remedy=remedy) from None
    except HFValidationError as error:
        raise SourceError("not a repository's name", file=str(place), found=str(error).partition(".")[0]) from None


def refused(error: Any, place: Place) -> SourceError:
    """What the Hub's refusal means for the user."""
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    status, page = error.response.status_code, f"{_endpoint()}/{place.repo}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return SourceError("a gated repository", file=str(place), remedy=f"accept its terms at {page}, then {login}")
    if isinstance(error, RepositoryNotFoundError):
        fact = f"no such file or folder here, and no such repository at {page}, or a private one"
        return SourceError(fact, file=str(place), remedy=f"check the name; for a private one, {login} of an account that may read it")
    if isinstance(error, RevisionNotFoundError):
        return SourceError("the repository has no such revision", file=str(place), found=place.revision, remedy=f"see {page}/branches")
    if isinstance(error, RemoteEntryNotFoundError):
        return SourceError("the repository has no such file", file=str(place), remedy=f"see {page}/tree/{place.revision or 'main'}")
    if status == 401:
        return SourceError("the Hub does not accept the token", file=str(place), remedy=f"{login} of a valid one")
    if status == 403:
        return SourceError("the token may not read it", file=str(place), remedy=f"give it the right to read {place.repo} at {_endpoint()}")
    if status == 429:
        return SourceError("the Hub wants fewer requests (429)", file=str(place), remedy=f"try again in some minutes; or {login}")
    if status >= 500:
        return SourceError(f"the Hub fails ({status})", file=str(place), remedy="try again later")
    return SourceError(f"the Hub refuses ({status})", file=str(place), found=without_token(error.server_message or "") or None)


def without_token(text: str) -> str:
    """A text that came from afar, and in which the token does not belong."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "…") if token else text


def _endpoint() -> str:
    from huggingface_hub.constants import ENDPOINT

    return ENDPOINT
