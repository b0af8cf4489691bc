"""Repositories on the Hub as paths: what is asked for, what is kept, and each refusal as one line."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.cli import _say
from loratools.errors import FormatError, OptionError
from loratools.source.place import Place, place_of
from loratools.source.watch import bar, watching
from tests.files import llama_config, llama_tensors, peft_config, read_checkpoint, write_adapter, write_checkpoint, write_pipeline
from tests.hub.client import Client
from tests.hub.repositories import User
from tests.hub.server import Hub

SHARDS = 3


def lora(folder: Path, count: int = 2, width: int = 8, factor: float = 1.0) -> Path:
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{x}.weight": factor * torch.ones((2, width) if x == "A" else (width, 2))
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


AHEAD = 1 << 16


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("length", [None, AHEAD - 8, AHEAD, AHEAD + 8, 2 * AHEAD, 3 * AHEAD + 8])
def test_a_header_of_any_length(hub: Hub, client: Client, tmp_path: Path, length: int | None, counts: bool) -> None:
    hub.counts = counts  # without it the length is not known beforehand
    modules = 2 if length is None else 250
    file = lora(tmp_path / "lora", modules, width=256) / "adapter_model.safetensors"
    data, own = file.read_bytes(), header_of(file)
    length = length or own
    file.write_bytes((length - 8).to_bytes(8, "little") + data[8:own] + b" " * (length - own) + data[own:])
    assert header_of(file) == length and file.stat().st_size > length
    hub.add("ada/lora", tmp_path / "lora")
    done = client.loratools("inspect", "ada/lora", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["modules_total"] == modules, done.stderr
    assert sum(request.sent for request in hub.asked("GET cdn")) <= length + AHEAD
    assert len(hub.answered()) == (3 if counts or length <= AHEAD else 4)
    assert {request.method for request in hub.log} == {"GET"}


def test_shards_whose_headers_are_long_take_one_request_each(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.counts = False
    tensors = {f"model.layers.{i}.mlp.experts.{j}.down_proj.weight": torch.ones(4, 64) for i in range(4) for j in range(700)}
    folder = write_checkpoint(tmp_path / "base", tensors, llama_config(), shards=3)
    hub.add("ada/base", folder)
    report = json.loads(client.loratools("inspect", "ada/base", "--json").stdout)
    lengths = [header_of(path) for path in folder.glob("*.safetensors")]
    assert report["tensors"] == 2800 and max(lengths) > AHEAD
    assert len(hub.answered()) == 3 + 3
    assert all(request.sent <= max(lengths) + AHEAD for request in hub.asked("GET cdn"))


def test_a_server_without_ranges_is_not_read_to_its_end(hub: Hub, client: Client, tmp_path: Path) -> None:
    folder = lora(tmp_path / "lora", 2, width=1 << 19)
    hub.add("ada/lora", folder)
    hub.fault("GET cdn", whole=True, times=9)
    done = client.loratools("inspect", "ada/lora", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["modules_total"] == 2, done.stderr
    # what lay in the buffers of two sockets was on its way
    assert sum(request.sent for request in hub.asked("GET cdn")) < (folder / "adapter_model.safetensors").stat().st_size / 2


def test_another_part_than_was_asked_for_is_refused(full: Hub, client: Client) -> None:
    full.fault("GET cdn", shift=8, times=9)
    done = client.loratools("inspect", "ada/lora")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the Hub sent another part than it was asked for: found bytes 8-" in done.stderr, done.stderr


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


# -- files within a repository, pipelines, repositories as outputs and bases


def test_a_file_and_a_folder_within_a_repository(full: Hub, client: Client, tmp_path: Path) -> None:
    files = full.repositories["ada/lora"].files
    full.add("ada/many", {"README.md": b"# many\n"} | {f"sub/{name}": data for name, data in files.items()})
    for path in ("hf://ada/many/sub/adapter_model.safetensors", "hf://ada/many/sub"):
        full.clear()
        report = json.loads(client.loratools("inspect", path, "--json").stdout)
        assert (report["path"], report["modules_total"]) == (path, 2)
        assert len(full.answered()) == 3
    path = "hf://ada/many@main/sub/adapter_model.safetensors:0.5"
    done = client.loratools("merge", tmp_path / "base", path, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    client.loratools("merge", tmp_path / "base", f"{tmp_path / 'lora'}:0.5", "-o", tmp_path / "same")
    merged, same = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "same")
    assert all(torch.equal(merged[name], same[name]) for name in same)
    commit = full.repositories["ada/many"].refs["main"]
    inputs = json.loads((tmp_path / "out/loratools.json").read_text())["inputs"]
    assert inputs[1]["path"] == f"hf://ada/many@{commit}/sub/adapter_model.safetensors"
    assert set(client.blobs().values()) == set(files.values()) | {value for value in client.blobs().values() if value.isdigit()}


def test_inspect_with_a_base_on_the_hub(full: Hub, client: Client, tmp_path: Path) -> None:
    done = client.loratools("inspect", "ada/lora", "--base", "ada/base", "--json")
    assert done.returncode == 0, done.stderr
    local = client.loratools("inspect", tmp_path / "lora", "--base", tmp_path / "base", "--json")
    assert json.loads(done.stdout) | {"path": ""} == json.loads(local.stdout) | {"path": ""}
    assert len(full.answered()) <= 3 + SHARDS + 3 and not client.cache.exists()


def test_a_pipeline_on_the_hub(hub: Hub, client: Client, tmp_path: Path) -> None:
    models = {"unet": ({"proj.weight": torch.ones(8, 8)}, {}), "text_encoder": ({"q_proj.weight": torch.ones(8, 8)}, {})}
    base = write_pipeline(tmp_path / "pipe", models)
    hub.add("ada/pipe", base)
    tensors = {"unet.proj.lora_A.weight": torch.ones(2, 8), "unet.proj.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    hub.add("ada/style", {"pytorch_lora_weights.safetensors": (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()})
    report = json.loads(client.loratools("inspect", "ada/pipe", "--json").stdout)
    assert sorted(report["components"]) == ["text_encoder", "unet"] and not client.cache.exists()
    done = client.loratools("merge", "ada/pipe", "hf://ada/style/pytorch_lora_weights.safetensors", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    [weights] = (tmp_path / "out/unet").glob("*.safetensors")
    assert torch.equal(load_file(weights)["proj.weight"], torch.full((8, 8), 3.0))
    assert (tmp_path / "out/model_index.json").read_bytes() == (base / "model_index.json").read_bytes()


def test_verify_of_a_repository(full: Hub, client: Client, tmp_path: Path) -> None:
    assert client.loratools("merge", "ada/base", "ada/lora", "-o", tmp_path / "out", "--reversible").returncode == 0
    full.add("ada/merged", tmp_path / "out")
    done = client.loratools("verify", "ada/merged", "--base", "ada/base", "--adapter", "ada/lora", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["path"], report["ok"], report["max_ulp"]) == ("ada/merged", True, 0) and report["digests"] == report["replayed"] > 0
    spoilt = dict(full.repositories["ada/merged"].files)
    name = next(name for name in spoilt if name.startswith("model-00001"))
    spoilt[name] = spoilt[name][:-1] + bytes([spoilt[name][-1] ^ 1])
    commit = full.add("ada/merged", spoilt | {"other.safetensors": spoilt[name]})
    done = client.loratools("verify", "ada/merged")
    assert done.returncode == 1 and f"Error: ada/merged@{commit}: " in done.stderr and "not the bytes that were written" in done.stderr
    assert f"hf://ada/merged@{commit}/other.safetensors: weights that the receipt does not know" in done.stderr
    assert client.loratools("verify", "ada/lora").stderr.startswith("Error: ada/lora: no receipt beside it; give --base and --adapter")


def test_unmerge_of_a_repository_finds_the_adapter_by_its_name(full: Hub, client: Client, tmp_path: Path) -> None:
    assert client.loratools("merge", "ada/base", "ada/lora", "-o", tmp_path / "out", "--reversible").returncode == 0
    record = (tmp_path / "out/unmerge.safetensors").read_bytes()
    commits = [full.repositories[name].refs["main"] for name in ("ada/base", "ada/lora")]
    assert f"hf://ada/lora@{commits[1]}/adapter_model.safetensors".encode() in record and f"ada/base@{commits[0]}".encode() in record
    assert str(client.home).encode() not in record
    full.add("ada/merged", tmp_path / "out")
    done = client.loratools("unmerge", "ada/merged", "-o", tmp_path / "back", HF_HOME=str(tmp_path / "another"))
    assert done.returncode == 0, done.stderr
    back, base = read_checkpoint(tmp_path / "back"), read_checkpoint(tmp_path / "base")
    assert all(torch.equal(back[name], base[name]) for name in base)


def test_what_is_not_downloaded_is_told(full: Hub, client: Client, tmp_path: Path) -> None:
    more = {"optimizer.pt": b"x", "consolidated.00.pth": b"x", "notes.txt": b"x"}
    commit = full.add("ada/base", full.repositories["ada/base"].files | more)
    done = client.loratools("merge", "ada/base", "ada/lora", "-o", tmp_path / "out")
    assert f"Note: not downloaded, 2 files of ada/base@{commit}: consolidated.00.pth, optimizer.pt\n" in done.stderr
    assert (tmp_path / "out/notes.txt").read_bytes() == b"x"
    assert "not downloaded" not in client.loratools("merge", tmp_path / "base", "ada/lora", "-o", tmp_path / "again").stderr


def test_faults_name_the_repository_and_not_the_cache(full: Hub, client: Client, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors") | {"stray": torch.ones(2)}
    save_file(tensors, tmp_path / "lora/adapter_model.safetensors")
    commit = full.add("ada/lora", tmp_path / "lora")
    done = client.loratools("convert", "ada/lora", "-o", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith(f"Error: hf://ada/lora@{commit}/adapter_model.safetensors: "), done.stderr
    assert str(client.home) not in done.stderr


# -- kohya's alphas, which lie among the data


def kohya(path: Path, alpha: torch.dtype, modules: int = 4) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    for i in range(modules):
        name = f"lora_unet_down_blocks_{i}_attentions_0_proj_in"
        down, up = torch.ones(4, 8192), torch.ones(8, 4)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2, dtype=alpha)}
    save_file(tensors, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "modules", "known", "requests"),
    [
        (torch.float16, 4, True, 3),  # behind the weights, which are wider: one request for all
        (torch.float64, 4, True, 2),  # before them: they come with the header
        (torch.float32, 4, False, 2),  # between them: all but the first not within 64 kB
        (torch.float64, 400, True, 3),  # before them, behind a long header: they come with its rest
    ],
)
def test_alphas(hub: Hub, client: Client, tmp_path: Path, dtype: torch.dtype, modules: int, known: bool, requests: int) -> None:
    hub.counts = False
    hub.add("ada/kohya", {"k.safetensors": kohya(tmp_path / "k.safetensors", dtype, modules)})
    done = client.loratools("inspect", "hf://ada/kohya/k.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert {(row["alpha"], row["scaling"]) for row in report["modules"][1:]} == {(2.0, 0.5) if known else (None, None)}
    warned = [text for text in report["warnings"] if "--values" in text]
    assert warned == ([] if known else [UNKNOWN])
    assert len(hub.answered()) == requests
    assert sum(request.sent for request in hub.asked("GET cdn")) <= header_of(tmp_path / "k.safetensors") + (1 << 16)
    if not known:
        shown = client.loratools("inspect", "hf://ada/kohya/k.safetensors")
        assert shown.returncode == 0 and "unknown: --values reads them" in shown.stdout
        read = json.loads(client.loratools("inspect", "hf://ada/kohya/k.safetensors", "--values", "--json").stdout)
        assert {row["scaling"] for row in read["modules"]} == {0.5} and UNKNOWN not in read["warnings"]


UNKNOWN = (
    "the alphas of 3 of 4 modules lie beyond the header that was fetched, so they and the scaling are unknown: --values reads them"
)


# -- progress, time, damage


def test_progress_on_a_terminal(full: Hub, client: Client, tmp_path: Path) -> None:
    environment = client.environment(TERM="xterm", COLUMNS="120")
    command = [sys.executable, "-m", "loratools", "merge", "ada/base", "ada/lora", "-o", str(tmp_path / "out")]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs) as run:
        os.close(theirs)
        told = b""
        with suppress(OSError):  # the terminal's other end was closed
            while block := os.read(ours, 4096):
                told += block
        assert run.wait(timeout=60) == 0, told
    os.close(ours)
    text = told.decode()
    for word in ("model-00001-of-00003.safetensors", "adapter_model.safetensors", "Merging", "kB", "0:00:00"):
        assert word in text, text


@pytest.mark.parametrize(("quiet", "terminal", "watched"), [(False, True, True), (True, True, False), (False, False, False)])
def test_who_is_shown_downloads(monkeypatch: pytest.MonkeyPatch, quiet: bool, terminal: bool, watched: bool) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    context = click.Context(click.Command("merge"))
    context.params["quiet"] = quiet
    with context, watching(_say.download), bar("x.safetensors", 10) as told:
        told(5)
        assert [task.completed for display in _say._displays for task in display.tasks] == ([5] if watched else [])
    assert not _say._displays


def test_a_hub_that_does_not_answer(full: Hub, client: Client, tmp_path: Path) -> None:
    full.fault("/api/models/", delay=2.0, times=9)
    done = client.loratools("inspect", "ada/lora", HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 1 and "does not answer in time" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    full.clear()
    full.fault("GET cdn/blob", delay=2.0)  # one that was late is asked again
    done = client.loratools("convert", "ada/lora", "-o", tmp_path / "out", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 0 and len(full.asked("GET cdn/blob")) == 2, done.stderr


def test_a_file_of_the_cache_whose_bytes_were_damaged_is_fetched_again(full: Hub, client: Client, tmp_path: Path) -> None:
    assert client.loratools("convert", "ada/lora", "-o", tmp_path / "first").returncode == 0
    data = (tmp_path / "lora/adapter_model.safetensors").read_bytes()
    [blob] = [path for path in client.cache.glob("models--*/blobs/*") if path.read_bytes() == data]
    full.clear()
    assert client.loratools("convert", "ada/lora", "-o", tmp_path / "second").returncode == 0
    assert not full.asked("GET cdn/blob")
    blob.write_bytes(data[:-1] + b"\7")
    assert client.loratools("convert", "ada/lora", "-o", tmp_path / "third").returncode == 0
    assert len(full.asked("GET cdn/blob")) == 1 and blob.read_bytes() == data
    for path in blob.parent.glob("*.checked"):  # as if another program had downloaded it
        path.unlink()
    full.clear()
    assert client.loratools("convert", "ada/lora", "-o", tmp_path / "fourth").returncode == 0
    assert not full.asked("GET cdn/blob") and blob.with_name(f"{blob.name}.loratools.checked").is_file()
