"""Repositories on the Hub as paths: what is asked for, what is kept, and each refusal as one line."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import FormatError, OptionError
from loratools.source.place import Place, place_of
from tests.files import llama_config, llama_tensors, peft_config, read_checkpoint, write_adapter, write_checkpoint
from tests.hub.client import Client
from tests.hub.repositories import User
from tests.hub.server import Hub

SHARDS = 3


def lora(folder: Path, count: int = 2) -> Path:
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight": torch.ones(2, 8) if x == "A" else torch.ones(8, 2)
        for i in range(count)
        for x in "AB"
    }
    return write_adapter(folder, tensors, peft_config(target_modules=["q_proj"]))


@pytest.fixture
def full(hub: Hub, tmp_path: Path) -> Hub:
    hub.add("ada/lora", lora(tmp_path / "lora"))
    hub.add("ada/base", write_checkpoint(tmp_path / "base", llama_tensors(), llama_config(), shards=SHARDS))
    return hub


def header_of(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("ada/lora", Place("ada/lora")),
        ("ada/lora@v1", Place("ada/lora", "v1")),
        ("ada/lora@refs/pr/1", Place("ada/lora", "refs/pr/1")),
        ("hf://ada/lora", Place("ada/lora")),
        ("hf://ada/lora@v1/unet/x.safetensors", Place("ada/lora", "v1", "unet/x.safetensors")),
        ("hf://ada/lora@refs%2Fpr%2F1/x", Place("ada/lora", "refs/pr/1", "x")),
    ],
)
def test_paths_that_name_a_repository(text: str, place: Place) -> None:
    assert place_of(text) == place
    assert place_of(str(place) if place.inner or "/" not in (place.revision or "") else text) == place


@pytest.mark.parametrize("text", ["nothing", "./ada/lora", "/ada/lora", "ada/lora/x", "ada/x.safetensors", "ada/a..b", "-a/b"])
def test_paths_that_can_only_be_local(text: str) -> None:
    with pytest.raises(FormatError, match="no such file or folder"):
        place_of(text)


@pytest.mark.parametrize("text", ["hf://ada", "hf://ada/lora/../x", "hf://"])
def test_no_place_on_the_hub(text: str) -> None:
    with pytest.raises(OptionError, match="not a path on the Hub"):
        place_of(text)


def test_a_local_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ada/lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert place_of("ada/lora") == Path("ada/lora")


def test_inspect_of_an_adapter_reads_its_header(full: Hub, client: Client, tmp_path: Path) -> None:
    done = client.loratools("inspect", "ada/lora", "--json")
    report = json.loads(done.stdout)
    assert (report["path"], report["modules_total"], report["ranks"]) == ("ada/lora", 2, {"2": 2}), done.stderr
    assert report["bytes"] == (tmp_path / "lora/adapter_model.safetensors").stat().st_size
    assert len(full.answered()) == 3
    assert not client.cache.exists()


@pytest.mark.parametrize(("counts", "requests"), [(True, 3), (False, 4)])
def test_a_header_longer_than_64_kb(hub: Hub, client: Client, tmp_path: Path, counts: bool, requests: int) -> None:
    hub.counts = counts  # without it the length is not known beforehand
    folder = lora(tmp_path / "lora", 400)
    hub.add("ada/lora", folder)
    length = header_of(folder / "adapter_model.safetensors")
    assert length > 1 << 16
    assert client.loratools("inspect", "ada/lora", "--json").returncode == 0
    assert sum(request.sent for request in hub.asked("GET cdn")) <= length + (1 << 16)
    assert len(hub.answered()) == requests


def test_inspect_of_a_checkpoint_reads_its_headers(full: Hub, client: Client) -> None:
    done = client.loratools("inspect", "ada/base")
    assert done.returncode == 0 and "in 3 shards" in done.stdout, done.stderr
    assert len(full.answered()) <= SHARDS + 3


def test_values_are_downloaded(full: Hub, client: Client) -> None:
    assert json.loads(client.loratools("inspect", "ada/lora", "--values", "--json").stdout)["values_checked"]
    assert client.cache.exists()


def test_merge_downloads_and_its_receipt_names_the_commit(full: Hub, client: Client, tmp_path: Path) -> None:
    full.add("ada/base", {**full.repositories["ada/base"].files, "optimizer.pt": b"x", "tokenizer.json": b"{}"})
    client.token = "hf_ada"
    done = client.loratools("merge", "ada/base", "ada/lora", "-o", tmp_path / "out", "--sha256")
    assert done.returncode == 0, done.stderr
    assert client.loratools("merge", tmp_path / "base", tmp_path / "lora", "-o", tmp_path / "same").returncode == 0
    merged, same = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "same")
    assert all(torch.equal(merged[name], same[name]) for name in same)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{}" and not full.asked("optimizer.pt")
    text = (tmp_path / "out/loratools.json").read_text()
    commit = full.repositories["ada/base"].refs["main"]
    inputs = json.loads(text)["inputs"]
    assert inputs[0]["path"] == f"ada/base@{commit}"
    assert inputs[1]["path"].startswith("hf://ada/lora@") and "sha256" in inputs[1]
    assert "hf_ada" not in text and str(client.home) not in text
    full.clear()
    offline = client.loratools("merge", "ada/base", "ada/lora", "-o", tmp_path / "again", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and not full.log, offline.stderr


def test_a_download_that_was_cut_off_goes_on(full: Hub, client: Client, tmp_path: Path) -> None:
    blob = tmp_path / "lora/adapter_model.safetensors"
    full.fault("GET cdn/blob", drop=300)
    full.fault("GET cdn/blob", status=403)
    first = client.loratools("convert", "ada/lora", "-o", tmp_path / "out")
    assert first.returncode == 1 and first.stderr.startswith("Error: ") and first.stderr.count("\n") == 1
    assert [name.endswith(".incomplete") for name, data in client.blobs().items() if len(data) == 300] == [True]
    second = client.loratools("convert", "ada/lora", "-o", tmp_path / "out")
    assert second.returncode == 0, second.stderr
    assert [request.headers.get("Range") for request in full.asked("GET cdn")] == [None, "bytes=300-", "bytes=300-"]
    assert blob.read_bytes() in client.blobs().values()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"corrupt": True}, "not the bytes that the Hub has a digest of"),
        ({"shorten": 100, "times": 1, "whole": True}, ""),  # the rest is asked for
        ({"shorten": 0, "times": 9}, "the Hub sent less of it than it said"),
        ({"drop": 200, "times": 1}, ""),
    ],
)
def test_nothing_half_downloaded_is_used(full: Hub, client: Client, tmp_path: Path, fault: dict[str, object], words: str) -> None:
    full.fault("GET cdn/blob", **fault)
    done = client.loratools("convert", "ada/lora", "-o", tmp_path / "out")
    assert (done.returncode, words in done.stderr) == (1 if words else 0, True), done.stderr
    assert (tmp_path / "out").exists() is not bool(words)


@pytest.mark.parametrize(
    ("path", "token", "words"),
    [
        ("ada/none", None, "no such file or folder here, and no such repository"),
        ("ada/private", "hf_bob", "for a private one, log in"),
        ("ada/gated", None, "accept its terms at"),
        ("ada/gated", "hf_bob", "accept its terms at"),
        ("ada/lora", "hf_wrong", "the Hub does not accept the token"),
        ("ada/lora@gone", None, "no such revision: found gone"),
        ("hf://ada/lora/gone.safetensors", None, "no such file or folder; it has adapter_config.json"),
    ],
)
def test_refusals(full: Hub, client: Client, path: str, token: str | None, words: str) -> None:
    full.users["hf_bob"] = User("bob")
    full.add("ada/private", {"config.json": b"{}"}, private=True)
    full.add("ada/gated", dict(full.repositories["ada/lora"].files), gated=True)
    client.token = token
    done = client.loratools("inspect", path)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert token is None or token not in done.stderr


@pytest.mark.parametrize(("status", "words"), [(403, "may not read it"), (429, "fewer requests"), (503, "the Hub fails (503)")])
def test_refusals_that_stay(full: Hub, client: Client, status: int, words: str) -> None:
    full.fault("/api/models/", status=status, times=9)
    done = client.loratools("inspect", "ada/lora")
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_refusal_that_passes(full: Hub, client: Client) -> None:
    full.fault("/api/models/", status=503)
    assert client.loratools("inspect", "ada/lora").returncode == 0


def test_no_network(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = client.loratools("inspect", "ada/lora", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert done.returncode == 1 and "cannot be reached" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = client.loratools("inspect", "ada/lora", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_local_inspect_imports_no_client(client: Client, tmp_path: Path) -> None:
    code = f"import sys, loratools; loratools.inspect({str(lora(tmp_path / 'lora'))!r}); print('huggingface_hub' in sys.modules)"
    assert client.python(code, fresh=True).stdout == "False\n"


def test_a_pickle_is_downloaded_or_refused(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    hub.add("ada/lora", folder)
    done = client.loratools("inspect", "ada/lora")
    assert done.returncode == 1 and "hf://ada/lora/adapter_model.bin: only headers of safetensors files" in done.stderr
    assert client.loratools("inspect", "ada/lora", "--values").returncode == 0
