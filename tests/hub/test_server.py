"""The Hub on loopback against the real client: what it reads, what it publishes, and how it takes each fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.client import Client
from tests.hub.repositories import User
from tests.hub.server import Hub

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 40, "tokenizer/vocab.txt": b"a\nb\n"}


def output(done: object) -> str:
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    return done.stdout.strip()  # type: ignore[attr-defined, no-any-return]


def test_files_and_snapshots_are_downloaded(hub: Hub, client: Client) -> None:
    commit = hub.add("ada/model", FILES)
    hub.page_size = 2
    told = output(
        client.python("""
        from huggingface_hub import hf_hub_download, snapshot_download, HfApi
        print(hf_hub_download("ada/model", "model.safetensors"))
        print(snapshot_download("ada/model"))
        api = HfApi()
        print(api.model_info("ada/model").sha, *[f.path for f in api.get_paths_info("ada/model", ["config.json", "none"])])
        """)
    ).splitlines()
    assert Path(told[0]).read_bytes() == FILES["model.safetensors"]
    snapshot = Path(told[1])
    assert snapshot.name == commit
    assert {str(path.relative_to(snapshot)): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()} == FILES
    assert told[2] == f"{commit} config.json"


def test_a_folder_is_published(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 5000)
    client.token = "hf_ada"
    code = f"""
        from huggingface_hub import create_repo, upload_folder, whoami, HfApi, CommitOperationDelete, CommitOperationAdd
        assert whoami()["name"] == "ada"
        create_repo("ada/new", private=True)
        create_repo("ada/new", exist_ok=True)
        print(upload_folder(repo_id="ada/new", folder_path={str(folder)!r}).oid)
        operations = [CommitOperationDelete("README.md"), CommitOperationAdd("notes.txt", b"hello")]
        print(HfApi().create_commit("ada/new", operations, commit_message="notes").oid)
        print(upload_folder(repo_id="ada/new", folder_path={str(folder)!r}, allow_patterns="*.safetensors").oid)
    """
    first, second, third = output(client.python(code)).splitlines()
    repo = hub.repositories["ada/new"]
    assert repo.private and second == third == repo.refs["main"]  # nothing new: no commit
    assert repo.commits[first].files["adapter_model.safetensors"].data == b"\0" * 5000
    assert repo.commits[first].files["adapter_model.safetensors"].large and not repo.commits[first].files["README.md"].large
    assert "README.md" not in repo.files and repo.files["notes.txt"] == b"hello"
    assert [request.received for request in hub.asked("PUT cdn/upload")] == [5000]


def test_large_files_go_up_in_parts_and_not_twice(hub: Hub, client: Client) -> None:
    hub.part_size = 1000
    client.token = "hf_ada"
    code = """
        from huggingface_hub import create_repo, upload_file
        create_repo("ada/new", exist_ok=True)
        upload_file(path_or_fileobj=bytes(range(250)) * 10, path_in_repo="x.bin", repo_id="ada/new", commit_message="up")
    """
    hub.fault("POST /api/models/ada/new/commit", status=403)
    assert client.python(code).returncode == 1  # interrupted after the upload …
    assert "x.bin" not in hub.repositories["ada/new"].files
    output(client.python(code))  # … and gone on with, without sending it again
    assert hub.repositories["ada/new"].files["x.bin"] == bytes(range(250)) * 10
    assert [request.received for request in hub.asked("PUT cdn/upload")] == [1000, 1000, 500]


@pytest.mark.parametrize(
    ("token", "repo", "error"),
    [
        (None, "ada/none", "RepositoryNotFoundError"),
        (None, "ada/private", "RepositoryNotFoundError"),
        (None, "ada/gated", "GatedRepoError"),
        ("hf_bob", "ada/private", "RepositoryNotFoundError"),
        ("hf_bob", "ada/gated", "GatedRepoError"),
        ("hf_wrong", "ada/private", "HfHubHTTPError"),
        ("hf_ada", "ada/private", ""),
        ("hf_ada", "ada/gated", ""),
        (None, "ada/public@gone", "RevisionNotFoundError"),
        (None, "ada/public:gone.json", "RemoteEntryNotFoundError"),
    ],
)
def test_who_may_read(hub: Hub, client: Client, token: str | None, repo: str, error: str) -> None:
    hub.users["hf_bob"] = User("bob")
    hub.add("ada/public", FILES)
    hub.add("ada/private", FILES, private=True)
    hub.add("ada/gated", FILES, gated=True)
    client.token = token
    name, _, file = repo.partition(":")
    name, _, revision = name.partition("@")
    code = f"""
        from huggingface_hub import hf_hub_download
        try:
            hf_hub_download({name!r}, {file or "config.json"!r}, revision={revision or "main"!r})
        except Exception as error:
            print(type(error).__name__)
    """
    assert output(client.python(code)) == error


def test_who_may_write(hub: Hub, client: Client) -> None:
    hub.users["hf_reader"] = User("ada", role="read")
    code = """
        from huggingface_hub import create_repo
        for repo in ("ada/x", "bob/x"):
            for token in ("hf_ada", "hf_reader", False):
                try:
                    create_repo(repo, token=token)
                    print(200)
                except Exception as error:
                    print(error.response.status_code)
    """
    assert output(client.python(code)).split() == ["200", "403", "401", "403", "403", "401"]


def test_a_card_that_the_hub_refuses(hub: Hub, client: Client) -> None:
    client.token = "hf_ada"
    code = """
        from huggingface_hub import create_repo, upload_file
        create_repo("ada/new")
        for card in ("base_model: ../there", "license: mine", "a: [", "base_model: ada/base"):
            try:
                upload_file(path_or_fileobj=f"---\\n{card}\\n---\\n".encode(), path_in_repo="README.md", repo_id="ada/new")
                print("taken")
            except ValueError as error:
                print("refused")
    """
    assert output(client.python(code)).split() == ["refused"] * 3 + ["taken"]


def test_faults(hub: Hub, client: Client) -> None:
    hub.add("ada/model", FILES)
    code = """
        import time
        import huggingface_hub.file_download as module
        time.sleep = lambda seconds: None
        module.constants.DOWNLOAD_CHUNK_SIZE = 100
        def told(**words):
            try:
                path = module.hf_hub_download("ada/model", "model.safetensors", force_download=True)
                return open(path, "rb").read().hex()
            except Exception as error:
                return type(error).__name__
        print(told(), told(), told(), told(), told())
    """
    whole = FILES["model.safetensors"]
    hub.fault("GET cdn/blob", drop=1000)
    hub.fault("GET cdn/blob", drop=500)
    hub.fault("GET cdn/blob")  # this one goes well
    hub.fault("GET cdn/blob", shorten=100)
    hub.fault("GET cdn/blob", corrupt=True)
    hub.fault("GET cdn/blob", status=429, times=2, headers={"Retry-After": "0"})
    hub.fault("GET cdn/blob")  # as does this
    hub.fault("GET cdn/blob", status=500)
    first, second, third, fourth, fifth = output(client.python(code)).split()
    assert first == whole.hex()  # dropped twice, gone on with
    assert [request.headers.get("Range") for request in hub.asked("GET cdn")[:3]] == [None, "bytes=1000-", "bytes=1500-"]
    assert second == "OSError"  # shorter than was promised
    assert third == (whole[:-1] + bytes([whole[-1] ^ 0xFF])).hex()  # the client itself does not check the digest
    assert fourth == whole.hex() and fifth == "HfHubHTTPError"
    assert all(fault.times == 0 for fault in hub.faults)


def test_ranges(hub: Hub) -> None:
    import urllib.error
    import urllib.request

    hub.add("ada/model", FILES)

    def got(value: str) -> tuple[int, bytes, str | None]:
        request = urllib.request.Request(f"{hub.url}/ada/model/resolve/main/model.safetensors", headers={"Range": value})
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read(), answer.headers["Content-Range"]
        except urllib.error.HTTPError as error:
            return error.code, b"", error.headers["Content-Range"]

    assert got("bytes=2-4") == (206, b"\2\3\4", "bytes 2-4/10240")
    assert got("bytes=10238-20000") == (206, b"\xfe\xff", "bytes 10238-10239/10240")
    assert got("bytes=-1") == (206, b"\xff", "bytes 10239-10239/10240")
    assert got("bytes=10240-") == (416, b"", "bytes */10240")
    hub.fault("GET cdn", whole=True)
    assert got("bytes=2-4")[0] == 200
    assert str(hub.log[0]).startswith("GET /ada/model/resolve/main/model.safetensors 302 0")
