"""A Hub on loopback: the part of huggingface.co's wire protocol that reading and publishing models needs, with faults on demand.

Two ports, as the Hub and its CDN are two origins: files in git are redirected within the Hub, large files to the CDN, which refuses
requests that carry a token (a signed URL does). The protocol is that of huggingface_hub 2.4.0, whose client runs against it
unmodified. Not spoken: Xet.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.repositories import LARGE, Commit, File, Repository, User, card_faults, elements, files_of

PIECE = 1 << 16
REPO = r"(?P<repo>[^/]+/[^/]+?|[^/]+?)"


@dataclass
class Request:
    """A request that was answered: where, what, with which status and how many bytes of body each way."""

    method: str
    path: str
    cdn: bool
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0
    received: int = 0

    @property
    def redirect(self) -> bool:
        return 300 <= self.status < 400

    def __str__(self) -> str:
        return f"{self.method} {'cdn' if self.cdn else ''}{self.path} {self.status} {self.sent}"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" (or "METHOD cdn/path") matches."""

    match: str
    times: int = 1
    status: int | None = None  # answer with this
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: int | None = None  # close the connection after so many bytes of the body, sent or (PUT, POST) received
    shorten: int | None = None  # a body of so many bytes that says it is whole
    corrupt: bool = False  # turn the bits of the body's last byte
    delay: float = 0.0  # seconds before anything is answered
    whole: bool = False  # take no notice of Range
    shift: int = 0  # answer a Range by the part so many bytes further on


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class Hub:
    """Repositories by id, users by token, the store of large files, the log and the faults to come."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.users: dict[str, User] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.part_size: int | None = None  # uploads in parts of so many bytes, where a file has more
        self.page_size = 1000
        self.counts = True  # whether a model's info tells the elements of its one file of weights, as the Hub's mostly does
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.url = self.cdn_url = ""

    def add(self, repo_id: str, files: Path | Mapping[str, bytes], *, revision: str = "main", **flags: Any) -> str:
        """A commit with the files of a folder, in a new repository or one that is there; returns its hash."""
        with self.lock:
            repo = self.repositories.setdefault(repo_id, Repository(repo_id))
            for name, value in flags.items():
                setattr(repo, name, value)
            found = files_of(files)
            self.store |= {file.sha256: file.data for file in found.values() if file.large}
            return repo.commit(found, revision=revision)

    def fault(self, match: str, **words: Any) -> Fault:
        """Let the next requests go wrong; the fault's `times` counts down to 0."""
        made = Fault(match, **words)
        self.faults.append(made)
        return made

    def asked(self, match: str = "") -> list[Request]:
        """The requests so far whose line "METHOD path" has a match."""
        return [request for request in self.log if re.search(match, f"{request.method} {'cdn' if request.cdn else ''}{request.path}")]

    def answered(self) -> list[Request]:
        """The requests so far, but those that were only sent on."""
        return [request for request in self.log if not request.redirect]

    def clear(self) -> None:
        self.log.clear()
        self.faults.clear()


def handler(hub: Hub, cdn: bool) -> type[BaseHTTPRequestHandler]:
    """The class that answers one of the two ports."""

    class Bound(Answer):
        pass

    Bound.hub, Bound.cdn = hub, cdn
    return Bound


class Answer(BaseHTTPRequestHandler):
    hub: Hub
    cdn: bool
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def answer(self) -> None:
        self.request_seen = Request(self.command, self.path, self.cdn, dict(self.headers.items()))
        line = f"{self.command} {'cdn' if self.cdn else ''}{self.path}"
        with self.hub.lock:
            self.hub.log.append(self.request_seen)
            self.fault = next((fault for fault in self.hub.faults if fault.times > 0 and re.search(fault.match, line)), None)
            if self.fault is not None:
                self.fault.times -= 1
        fault = self.fault
        if fault is not None and fault.delay:
            time.sleep(fault.delay)
        body = self.body()
        if body is None:
            return
        if fault is not None and fault.status is not None:
            self.reply(fault.status, json.dumps({"error": "a fault"}).encode(), dict(fault.headers), faulty=False)
            return
        try:
            with self.hub.lock:
                split = urlsplit(self.path)
                for method, pattern, function in CDN_ROUTES if self.cdn else ROUTES:
                    found = re.fullmatch(pattern, split.path)
                    if found is not None and self.command in method:
                        groups = {name: unquote(text) for name, text in found.groupdict().items() if text is not None}
                        reply = function(self, groups, body, parse_qs(split.query))
                        break
                else:
                    raise Refusal(404, None, f"no route for {line}")
        except Refusal as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self.reply(error.status, json.dumps({"error": error.message}).encode(), headers, faulty=False)
            return
        self.reply(*reply)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def body(self) -> bytes | None:
        """What was sent along; None where the connection was cut meanwhile."""
        limit = self.fault.drop if self.fault is not None and self.command in ("PUT", "POST") else None
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while (size := int(self.rfile.readline().split(b";")[0], 16)) > 0:
                data += self.rfile.read(size)
                self.rfile.readline()
                if limit is not None and len(data) >= limit:
                    return self.cut()
            self.rfile.readline()
        else:
            length = int(self.headers.get("Content-Length") or 0)
            if limit is not None:
                self.rfile.read(min(limit, length))
                return self.cut()
            data = self.rfile.read(length)
        self.request_seen.received = len(data)
        return data

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, faulty: bool = True) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        fault = self.fault if faulty else None
        asked = self.headers.get("Range")
        if status == 200 and asked and "Accept-Ranges" in headers and not (fault and fault.whole):
            shift = fault.shift if fault is not None else 0
            asked = re.sub(r"\d+", lambda found: str(int(found[0]) + shift), asked)
            status, body, headers = ranged(asked, body, headers)
        if fault is not None and fault.corrupt and body:
            body = body[:-1] + bytes([body[-1] ^ 0xFF])
        if fault is not None and fault.shorten is not None:
            body = body[: fault.shorten]
        self.request_seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        dropped = fault is not None and fault.drop is not None and self.command == "GET"
        sent = body[: fault.drop] if dropped and fault is not None else body
        for place in range(0, len(sent), PIECE):  # a client that has closed the connection is noticed between two
            self.wfile.write(sent[place : place + PIECE])
            self.request_seen.sent += len(sent[place : place + PIECE])
        if dropped:
            self.wfile.flush()
            self.cut()

    # -- who asks, and for what

    def user(self) -> User | None:
        stated = self.headers.get("Authorization")
        if stated is None:
            return None
        token = stated.removeprefix("Bearer ")
        if token not in self.hub.users:
            raise Refusal(401, None, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def repository(self, repo_id: str) -> Repository:
        user, found = self.user(), self.hub.repositories.get(repo_id)
        if found is None or not found.may_read(user):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found" if user else "Invalid username or password.")
        return found

    def commit(self, repo_id: str, revision: str) -> tuple[Repository, Commit]:
        repo = self.repository(repo_id)
        found = repo.at(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, found

    def writer(self, repo_id: str) -> User:
        user = self.user()
        if user is None:
            raise Refusal(401, None, "Invalid username or password.")
        if user.role != "write":
            raise Refusal(403, None, "Forbidden: you must use a write token to upload to a repository")
        if not user.owns(repo_id):
            raise Refusal(403, None, f'You don\'t have the rights under the namespace "{repo_id.partition("/")[0]}"')
        return user

    def writable(self, repo_id: str) -> Repository:
        repo = self.repository(repo_id)
        self.writer(repo_id)
        return repo


Reply = tuple[int, bytes, Mapping[str, str]] | tuple[int, bytes]
Groups = Mapping[str, str]
Query = Mapping[str, list[str]]


def ranged(asked: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes, Mapping[str, str]]:
    """The part of a body that a Range asks for, or 416."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    size = len(body)
    if found is None or found.groups() == ("", ""):
        return 200, body, headers
    start = int(found[1]) if found[1] else max(size - int(found[2]), 0)
    stop = min(int(found[2]) + 1, size) if found[1] and found[2] else size
    if start >= size or stop <= start:
        return 416, b"", {**headers, "Content-Range": f"bytes */{size}"}
    return 206, body[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}


def as_json(document: Any, status: int = 200, **headers: str) -> Reply:
    return status, json.dumps(document).encode(), headers


# -- reading


def resolve(answer: Answer, groups: Groups, _: bytes, __: Query) -> Reply:
    repo, commit = answer.commit(groups["repo"], groups["rev"])
    user = answer.user()
    if not repo.may_download(user):
        told = f"Access to model {repo.id} is restricted"
        raise Refusal(403, "GatedRepo", f"{told} and you are not in the authorized list.") if user else Refusal(401, "GatedRepo", told)
    file = commit.files.get(groups["path"])
    if file is None:
        raise Refusal(404, "EntryNotFound", "Entry not found")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.large:
        location = f"{answer.hub.cdn_url}/blob/{file.sha256}?signature=granted"
        return 302, b"", {**headers, "X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)), "Location": location}
    return 307, b"", {**headers, "Location": f"/api/resolve-cache/models/{repo.id}/{commit.oid}/{quote(groups['path'], safe='')}"}


def resolved(answer: Answer, groups: Groups, _: bytes, __: Query) -> Reply:
    repo, commit = answer.commit(groups["repo"], groups["rev"])
    file = commit.files[groups["path"]]
    if not repo.may_download(answer.user()):
        raise Refusal(403, "GatedRepo", "not without the token")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "text/plain"}
    return 200, file.data, headers


def entry(name: str, file: File) -> dict[str, Any]:
    """A file as tree and paths-info list it."""
    made: dict[str, Any] = {"type": "file", "oid": file.oid, "size": len(file.data), "path": name}
    if file.large:
        made["lfs"] = {"oid": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return made


def tree(answer: Answer, groups: Groups, _: bytes, query: Query) -> Reply:
    _repo, commit = answer.commit(groups["repo"], groups["rev"])
    folder = (groups.get("path") or "").strip("/")
    inside = {name: file for name, file in commit.files.items() if not folder or name.startswith(folder + "/")}
    if folder and not inside:
        raise Refusal(404, "EntryNotFound", f"{folder} does not exist on this revision")
    rows, seen = list[dict[str, Any]](), set[str]()
    recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
    for name, file in sorted(inside.items()):
        parts = name[len(folder) + 1 if folder else 0 :].split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts) - 1)]
        for inner in above if recursive else above[:1]:
            path = f"{folder}/{inner}" if folder else inner
            if path not in seen:
                seen.add(path)
                rows.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": path})
        if recursive or not above:
            rows.append(entry(name, file))
    start = int(query.get("cursor", ["0"])[0])
    more = start + answer.hub.page_size < len(rows)
    link = f'<{answer.hub.url}{urlsplit(answer.path).path}?recursive={recursive}&cursor={start + answer.hub.page_size}>; rel="next"'
    return as_json(rows[start : start + answer.hub.page_size], **({"Link": link} if more else {}))


def paths_info(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    _repo, commit = answer.commit(groups["repo"], groups["rev"])
    asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
    return as_json([entry(name, commit.files[name]) for name in asked if name in commit.files])


def model_info(answer: Answer, groups: Groups, _: bytes, query: Query) -> Reply:
    repo, commit = answer.commit(groups["repo"], groups.get("rev", "main"))
    siblings = []
    for name, file in commit.files.items():
        row: dict[str, Any] = {"rfilename": name}
        if "blobs" in query:
            row |= {"size": len(file.data), "blobId": file.oid}
            row |= {"lfs": {"sha256": file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}} if file.large else {}
        siblings.append(row)
    info = {"_id": "0", "id": repo.id, "modelId": repo.id, "private": repo.private, "gated": "auto" if repo.gated else False}
    weights = [file.data for name, file in commit.files.items() if name.endswith(".safetensors")]
    if len(weights) == 1 and answer.hub.counts and (counted := elements(weights[0])):
        info["safetensors"] = {"parameters": counted, "total": sum(counted.values())}
    return as_json(info | {"sha": commit.oid, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})


def blob(answer: Answer, groups: Groups, _: bytes, __: Query) -> Reply:
    if answer.headers.get("Authorization"):
        raise Refusal(400, None, "Only one auth mechanism allowed")  # S3's words: the token must not leave the Hub
    if groups["oid"] not in answer.hub.store:
        raise Refusal(404, None, "no such object")
    data = answer.hub.store[groups["oid"]]
    return 200, data, {"ETag": '"cdn-etag"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}


# -- publishing


def whoami(answer: Answer, _: Groups, __: bytes, ___: Query) -> Reply:
    user = answer.user()
    if user is None:
        raise Refusal(401, None, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.orgs]
    token = {"accessToken": {"displayName": "test", "role": user.role}}
    return as_json({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": {"type": "access_token", **token}})


def create(answer: Answer, _: Groups, body: bytes, __: Query) -> Reply:
    asked = json.loads(body)
    user = answer.user()
    repo_id = f"{asked.get('organization') or (user.name if user else '')}/{asked['name']}"
    url = f"{answer.hub.url}/{repo_id}"
    answer.writer(repo_id)
    if repo_id in answer.hub.repositories:
        return as_json({"error": "You already created this model repo", "url": url}, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repo = answer.hub.repositories[repo_id] = Repository(repo_id, private=private)
    repo.commit({".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit")
    return as_json({"url": url, "name": repo_id, "id": "0"})


def validate_yaml(_: Answer, __: Groups, body: bytes, ___: Query) -> Reply:
    content = json.loads(body)["content"]
    faults = card_faults(content)
    if faults:
        return as_json({"errors": [{"message": text} for text in faults], "warnings": []}, 400)
    empty = [] if content.startswith("---") else [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": [], "warnings": empty})


def preupload(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    repo = answer.writable(groups["repo"])
    commit, rows = repo.at(groups["rev"]), []
    if commit is None:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {groups['rev']}")
    for asked in json.loads(body)["files"]:
        large = LARGE.search(asked["path"]) or asked["size"] > 10_000_000 or b"\0" in base64.b64decode(asked["sample"])
        row = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        there = commit.files.get(asked["path"])
        rows.append(row | ({"oid": there.etag} if there is not None else {}))
    return as_json({"files": rows})


def batch(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    answer.writable(groups["repo"])
    hub, objects = answer.hub, []
    for asked in json.loads(body)["objects"]:
        made = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] not in hub.store:
            url = f"{hub.cdn_url}/upload/{asked['oid']}"
            upload: dict[str, Any] = {"href": url}
            if hub.part_size is not None and asked["size"] > hub.part_size:
                count = -(-asked["size"] // hub.part_size)
                parts = {str(part + 1): f"{url}/{part + 1}" for part in range(count)}
                upload = {"href": f"{hub.url}/complete/{asked['oid']}", "header": {"chunk_size": str(hub.part_size), **parts}}
            verify = {"href": f"{hub.url}/{groups['repo']}.git/info/lfs/objects/verify"}
            made |= {"authenticated": True, "actions": {"upload": upload, "verify": verify}}
        objects.append(made)
    return as_json({"transfer": "basic", "objects": objects})


def keep(hub: Hub, oid: str, data: bytes) -> Reply:
    if File(data).sha256 != oid:
        raise Refusal(400, None, "the bytes are not those that the checksum was of")
    hub.store[oid] = data
    return 200, b""


def upload(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    if answer.headers.get("Authorization"):
        raise Refusal(400, None, "Only one auth mechanism allowed")
    return keep(answer.hub, groups["oid"], body)


def upload_part(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    answer.hub.parts[groups["oid"], int(groups["part"])] = body
    return 200, b"", {"ETag": f'"part-{groups["part"]}"'}


def complete(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    told = json.loads(body)
    if any(part["etag"] != f'"part-{part["partNumber"]}"' for part in told["parts"]):
        raise Refusal(400, None, "a part's etag is not the one that was told")
    return keep(answer.hub, groups["oid"], b"".join(answer.hub.parts[groups["oid"], part["partNumber"]] for part in told["parts"]))


def verify(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    answer.writable(groups["repo"])
    told = json.loads(body)
    if len(answer.hub.store.get(told["oid"], b"")) != told["size"]:
        raise Refusal(404, None, "Not found")
    return 200, b"{}"


def commit(answer: Answer, groups: Groups, body: bytes, _: Query) -> Reply:
    repo = answer.writable(groups["repo"])
    parent = repo.at(groups["rev"])
    if parent is None:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {groups['rev']}")
    files, summary = dict(parent.files), ""
    for line in body.splitlines():
        row = json.loads(line)
        value = row["value"]
        if row["key"] == "header":
            summary = value["summary"]
            if value.get("parentCommit", parent.oid) != parent.oid:
                raise Refusal(412, None, "A commit has happened since. Please refresh and try again.")
        elif row["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        elif row["key"] == "lfsFile":
            if value["oid"] not in answer.hub.store:
                raise Refusal(400, None, "LFS pointer pointed to a file that does not exist")
            files[value["path"]] = File(answer.hub.store[value["oid"]], large=True)
        else:
            path = value["path"].rstrip("/")
            files = {name: file for name, file in files.items() if name != path and not name.startswith(path + "/")}
    card = files.get("README.md")
    if card is not None and (faults := card_faults(card.data.decode())):
        raise Refusal(400, None, f"Invalid metadata in README.md: {'; '.join(faults)}")
    oid = repo.commit(files, summary, groups["rev"])
    return as_json({"success": True, "commitOid": oid, "commitUrl": f"{answer.hub.url}/{repo.id}/commit/{oid}", "hookOutput": ""})


Function = Callable[[Answer, Groups, bytes, Query], Reply]
ROUTES: tuple[tuple[tuple[str, ...], str, Function], ...] = (
    (("GET",), "/api/whoami-v2", whoami),
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate_yaml),
    (("GET", "HEAD"), rf"/api/resolve-cache/models/{REPO}/(?P<rev>[0-9a-f]{{40}})/(?P<path>.+)", resolved),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", tree),
    (("POST",), rf"/api/models/{REPO}/paths-info/(?P<rev>[^/]+)", paths_info),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<rev>[^/]+)", preupload),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<rev>[^/]+)", commit),
    (("GET",), rf"/api/models/{REPO}/revision/(?P<rev>[^/]+)", model_info),
    (("GET",), rf"/api/models/{REPO}", model_info),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", batch),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/verify", verify),
    (("POST",), r"/complete/(?P<oid>[0-9a-f]{64})", complete),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", resolve),
)
CDN_ROUTES: tuple[tuple[tuple[str, ...], str, Function], ...] = (
    (("GET", "HEAD"), r"/blob/(?P<oid>[0-9a-f]{64})", blob),
    (("PUT",), r"/upload/(?P<oid>[0-9a-f]{64})", upload),
    (("PUT",), r"/upload/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", upload_part),
)


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub and its CDN on two free ports of loopback, until the block is left."""
    hub, servers = Hub(), []
    for cdn in (False, True):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub, cdn))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
