"""loratools push against the Hub on loopback: one commit of exactly these files, the token nowhere, each refusal one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from loratools.ops.extract import extract
from loratools.ops.merge import merge
from loratools.ops.verify import verify
from tests.files import llama_config, llama_tensors, write_checkpoint
from tests.hub.client import Client
from tests.hub.repositories import File, User
from tests.hub.server import Hub

TOKEN = "hf_ada"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "loratools.json"}


@dataclass
class Ran:
    code: int
    out: str
    err: str


def run(client: Client, *commands: Sequence[str | Path], **settings: str) -> list[Ran]:
    """Several `loratools push …` in one process of their own; a word TOKEN=… at the beginning sets the token ("": none)."""
    lines = [[str(word) for word in words] for words in commands]
    code = f"""
        import contextlib, io, json, os, time
        from loratools.cli import run
        time.sleep = lambda seconds: None
        for words in json.loads({json.dumps(lines)!r}):
            if words[0].startswith("TOKEN="):
                os.environ["HF_TOKEN"] = words.pop(0).removeprefix("TOKEN=")
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = run(["push", *words])
            print(json.dumps([code, out.getvalue(), err.getvalue()]))
    """
    done = client.python(code, **settings)
    assert done.returncode == 0, done.stderr
    assert "hf_" not in done.stdout + done.stderr
    return [Ran(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, adapter/ extracted from a fine-tune of it, merged/ in two shards."""
    root = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(1)
    base = llama_tensors()
    tuned = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in base.items() if "norm" not in name}
    write_checkpoint(root / "base", base, llama_config(), shards=2)
    write_checkpoint(root / "tuned", base | tuned, llama_config(), shards=2)
    extract(root / "base", root / "tuned", root / "adapter", rank=2)
    merge(root / "base", root / "adapter", root / "merged")
    for name in ("optimizer.pt", ".env", "token", "training.log"):
        (root / "adapter" / name).write_text(f"HF_TOKEN={TOKEN}")
    return root


@pytest.fixture
def ada(hub: Hub, client: Client) -> Client:
    """Ada at her machine, logged in; her base is on the Hub, with a licence."""
    hub.add("ada/base", {"README.md": b"---\nlicense: llama3.1\n---\n# A base\n"})
    client.token = TOKEN
    return client


def test_one_commit_and_nothing_else(hub: Hub, ada: Client, made: Path, tmp_path: Path) -> None:
    words = [made / "adapter", "ada/style", "--base-model", "ada/base", "--private", "--message", "First"]
    first, again = run(ada, words, [*words[:4], "--json"])
    assert first.code == again.code == 0, first.err
    repo = hub.repositories["ada/style"]
    (commit,) = [commit for commit in repo.commits.values() if commit.parent is not None]  # nothing new: no second one
    assert commit.message == "First" and repo.private
    assert set(commit.files) == FILES | {".gitattributes"}
    assert first.out.splitlines()[0] == f"pushed   {hub.url}/ada/style, private"
    assert all(f"{name}: no part of what is published" in first.out for name in (".env", "optimizer.pt", "token", "training.log"))
    told = json.loads(again.out)
    assert told["commit"] == commit.oid and {row["path"] for row in told["files"]} == FILES and told["license"] == "llama3.1"
    assert not any(TOKEN.encode() in data for data in repo.files.values())
    assert commit.files["adapter_model.safetensors"].large and len(hub.asked("PUT")) == 1
    for name, data in repo.files.items():
        (tmp_path / "up").mkdir(exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)
    assert verify(tmp_path / "up")["ok"]  # the receipt is true of what went up
    assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "ada/base"
    assert json.loads((made / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    card = repo.files["README.md"].decode()
    assert "base_model: ada/base\nbase_model_relation: adapter\nlibrary_name: peft\nlicense: llama3.1\n" in card
    assert "loratools extract base tuned -o adapter --rank 2" in card and str(made) not in card


def test_a_dry_run_sends_nothing(hub: Hub, ada: Client, made: Path) -> None:
    words = [made / "adapter", "ada/style", "--base-model", "ada/base", "--dry-run"]
    logged, anonymous = run(ada, words, ["TOKEN=", *words])
    assert {request.method for request in hub.log} <= {"GET", "HEAD"} and "ada/style" not in hub.repositories
    assert logged.code == anonymous.code == 0
    assert logged.out == anonymous.out and logged.out.startswith(f"would push  {hub.url}/ada/style\n")
    assert all(name in logged.out for name in FILES) and "licence     llama3.1" in logged.out
    assert "Note: not logged in: log in with `hf auth login` or set HF_TOKEN" in anonymous.err and "not logged in" not in logged.err


def test_prose_is_kept_and_the_hubs_card_is_read(hub: Hub, ada: Client, made: Path) -> None:
    hub.add("ada/style", {"README.md": b"---\nlicense: mit\nlanguage: [en]\n---\n# Mine\n\nProse.\n", "notes.txt": b"x"})
    words = [made / "adapter", "ada/style", "--base-model", "ada/base"]
    (first,) = run(ada, words)
    repo = hub.repositories["ada/style"]
    card = repo.files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\nlanguage: [en]\nbase_model: ada/base\n") and "\n# Mine\n\nProse.\n\n<!-- loratools" in card
    assert "the card keeps its licence mit; the base's is llama3.1" in first.err and repo.files["notes.txt"] == b"x"
    files = {name: File(data) for name, data in repo.files.items()}
    repo.commit(files | {"README.md": File(card.replace("Prose.", "Better prose.").encode())}, "by hand")
    public, second = run(ada, [*words, "--private"], words)
    assert public.err == (
        "Error: ada/style: the repository exists already, and is public; "
        f"make it private at {hub.url}/ada/style/settings, or leave out --private\n"
    )
    assert second.code == 0 and repo.files["README.md"].decode() == card.replace("Prose.", "Better prose.")


def test_a_merge_goes_up_and_an_interrupted_upload_goes_on(hub: Hub, ada: Client, made: Path) -> None:
    words = [made / "merged", "ada/merged", "--base-model", "ada/base"]
    hub.fault("PUT cdn/upload", drop=100)  # taken up again within the run
    hub.fault("PUT cdn/upload", status=403)  # ends it
    failed, done = run(ada, words, words)
    assert failed.code == 1 and failed.err.count("\nError: ") + failed.err.startswith("Error: ") == 1
    sent = [request for request in hub.asked("PUT cdn/upload") if request.status == 200]
    assert done.code == 0 and len(sent) == len({request.path for request in sent}) == 2
    repo = hub.repositories["ada/merged"]
    shards = {f"model-0000{place}-of-00002.safetensors" for place in (1, 2)}
    assert set(repo.files) == shards | {".gitattributes", "README.md", "config.json", "loratools.json", "model.safetensors.index.json"}
    assert b"base_model_relation: merge" in repo.files["README.md"]
    for name in shards:
        assert repo.files[name] == (made / "merged" / name).read_bytes()


def test_a_killed_upload_goes_on(hub: Hub, ada: Client, made: Path) -> None:
    words = ["push", made / "merged", "ada/merged", "--base-model", "ada/base"]
    hub.fault("POST /api/models/ada/merged/commit", delay=30)
    command = [sys.executable, "-m", "loratools", *map(str, words)]
    running = subprocess.Popen(command, env=ada.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not hub.asked("POST /api/models/ada/merged/commit") and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert len(hub.asked("PUT")) == 2
    (done,) = run(ada, words[1:])
    assert done.code == 0, done.err
    assert len(hub.asked("PUT")) == 2  # neither was sent again
    assert "model-00001-of-00002.safetensors" in hub.repositories["ada/merged"].files


def test_refusals_are_one_line_each_with_a_remedy(hub: Hub, ada: Client, made: Path) -> None:
    hub.users["hf_reader"] = User("ada", role="read")
    words = [made / "adapter", "ada/style", "--base-model", "ada/base"]
    commit, create = "POST /api/models/ada/style/commit", "POST /api/repos/create"
    cases: list[tuple[list[str | Path], str, int | None, str]] = [
        (["TOKEN=", *words], "", None, "ada/style: not logged in; log in with `hf auth login` or set HF_TOKEN"),
        (["TOKEN=hf_wrong", *words], "", None, "the Hub does not accept the token (401); log in with `hf auth login` or set HF_"),
        (["TOKEN=hf_ada", *words], create, 403, "no right to write there (403): found a fault; use a token that may write to it, from"),
        (words, create, 429, "the Hub wants fewer requests (429); wait some minutes; run it again: large files that arrived are not"),
        (words, create, 500, "ada/style: the Hub fails (500); try later; run it again"),
        (words, create, 503, "ada/style: the Hub fails (503); try later; run it again"),
        (words, commit, 404, "ada/style: no such repository, or none that the token may see (404); check the name and the token"),
        (words, commit, 412, "ada/style: somebody else has committed meanwhile (412); run it again"),
        (words, commit, 413, "ada/style: the Hub refuses (413): found a fault"),
        ([words[0], "bob/x", *words[2:]], "", None, "bob/x: the token has no right to write there (403): found You don't have the ri"),
        (["TOKEN=hf_reader", *words], "", None, "ada/style: the token has no right to write there (403): found Forbidden: you must"),
    ]
    for _, match, status, _ in cases:
        if status is not None:  # what may pass is tried three times more
            hub.fault(match, status=status, times=4 if status in (429, 500, 503) else 1)
    for ran, (_, _, _, said) in zip(run(ada, *(words for words, *_ in cases)), cases, strict=True):
        lines = [line for line in ran.err.splitlines() if not line.startswith("Note: ")]
        assert ran.code == 1 and ran.out == "" and len(lines) == 1 and said in lines[0], (ran, said)
    assert set(hub.repositories["ada/style"].files) == {".gitattributes"}


def test_what_passes_is_waited_for(hub: Hub, ada: Client, made: Path) -> None:
    later = {"Retry-After": "0"}
    for match in ("GET /api/models/ada/base", "POST /api/validate-yaml", "POST /api/repos/create"):
        hub.fault(match, status=503)
        hub.fault(match, status=429, headers=later)
    for match in ("preupload", "POST /api/models/ada/style/commit"):
        hub.fault(match, status=429, headers=later)
    hub.fault("PUT cdn/upload", status=500)
    (ran,) = run(ada, [made / "adapter", "ada/style", "--base-model", "ada/base"])
    assert ran.code == 0, ran.err
    assert all(fault.times == 0 for fault in hub.faults)
    assert len([one for one in hub.repositories["ada/style"].commits.values() if one.parent is not None]) == 1
    hub.add("ada/base", hub.repositories["ada/base"].files)
    hub.fault("POST /api/models/ada/style/commit", status=502)  # it may have come into being: it is not sent again
    (ran,) = run(ada, [made / "merged", "ada/style", "--base-model", "ada/base"])
    assert ran.code == 1 and "the Hub fails (502); try later; run it again" in ran.err
    assert len(hub.asked("POST /api/models/ada/style/commit")) == 3


def test_a_dry_run_lists_what_then_goes_up(hub: Hub, ada: Client, made: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "one" / name).write_bytes((made / "adapter" / name).read_bytes())
    things = {"ada/a": made / "adapter", "ada/m": made / "merged", "ada/f": tmp_path / "one/adapter_model.safetensors"}
    words = [[path, repo, "--base-model", "ada/base", "--json"] for repo, path in things.items()]
    for dry, done, repo in zip(run(ada, *([*line, "--dry-run"] for line in words)), run(ada, *words), things, strict=True):
        before, after = json.loads(dry.out), json.loads(done.out)
        assert before["commit"] is None and after["commit"] is not None
        assert before["dry_run"] and {key: value for key, value in before.items() if key not in ("commit", "dry_run")} == {
            key: value for key, value in after.items() if key not in ("commit", "dry_run")
        }
        there = hub.repositories[repo].files
        assert {row["path"]: row["bytes"] for row in before["files"]} == {
            name: len(data) for name, data in there.items() if name != ".gitattributes"
        }
        assert there["README.md"].decode() == before["card"]


def test_a_token_that_comes_back_is_not_told(hub: Hub, ada: Client, made: Path) -> None:
    told = {"X-Error-Message": f"the token {TOKEN} is no good", "X-Request-Id": "1"}
    hub.fault("POST /api/repos/create", status=400, headers=told)
    hub.fault("POST /api/repos/create", status=403, headers=told)
    hub.add("ada/adapter", made / "adapter")
    words = [made / "adapter", "ada/style", "--base-model", "ada/base"]
    for ran in run(ada, words, words):
        assert ran.code == 1 and "the token … is no good" in ran.err  # `run` itself looks for the token
    hub.fault("GET /api/models/ada/adapter", status=418, headers=told, times=9)
    done = ada.loratools("inspect", "ada/adapter")
    assert done.returncode == 1 and "the token … is no good" in done.stderr
    done = ada.python("""
        import loratools
        try:
            loratools.inspect("ada/adapter")
        except Exception as error:
            print(error, repr(error), error.args, vars(error))
    """)
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr and "no good" in done.stdout, done.stderr


def test_the_token_is_in_no_log_and_no_file(hub: Hub, ada: Client, made: Path) -> None:
    hub.add("ada/adapter", made / "adapter")
    done = ada.python(f"""
        import logging, loratools
        logging.basicConfig(level=1)
        loratools.push({str(made / "adapter")!r}, "ada/style", base_model="ada/base")
        loratools.merge({str(made / "base")!r}, "ada/adapter", {str(ada.home / "merged")!r})
    """)
    assert done.returncode == 0 and "HTTP Request: POST" in done.stderr and TOKEN not in done.stdout + done.stderr, done.stderr
    assert (ada.home / "merged/loratools.json").is_file()
    files = [path for path in ada.home.rglob("*") if path.is_file()] + [made / "adapter/loratools.json"]
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_a_card_on_the_hub_that_is_no_utf_8_is_not_damaged(hub: Hub, ada: Client, made: Path) -> None:
    hub.add("ada/style", {"README.md": b"---\nlicense: mit\n---\n# caf\xe9\n"})
    (ran,) = run(ada, [made / "adapter", "ada/style", "--base-model", "ada/base"])
    assert ran.code == 1 and "README.md: the repository's card is no UTF-8; save it as UTF-8, or delete it there" in ran.err
    assert hub.repositories["ada/style"].files["README.md"].endswith(b"caf\xe9\n")


def test_no_network_and_offline(hub: Hub, ada: Client, made: Path) -> None:
    words = [made / "adapter", "ada/style", "--base-model", "ada/base"]
    offline, dry = run(ada, words, [*words, "--dry-run"], HF_HUB_OFFLINE="1")
    assert dry.code == 0 and "not asked of the Hub: ada/style: HF_HUB_OFFLINE is set" in dry.err and "licence     other" in dry.out
    assert offline.err == "Error: ada/style: HF_HUB_OFFLINE is set; unset it, or see what would go up with --dry-run\n"
    (lost,) = run(ada, words, HF_ENDPOINT="http://127.0.0.1:9")
    assert lost.code == 1 and lost.err.startswith("Error: ada/style: the Hub cannot be reached: found http://127.0.0.1:9 (")
    assert "is there a network? run it again" in lost.err and lost.err.count("\n") == 1
    assert hub.log == []


def test_what_must_not_go_up_stops_it_before_anything_is_made(hub: Hub, ada: Client, made: Path, tmp_path: Path) -> None:
    def folder(name: str, card: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file in FILES - {"README.md"}:
            (path / file).write_bytes((made / "adapter" / file).read_bytes())
        (path / "README.md").write_text(card)
        return path

    cases = [
        (folder("token", f"My token is {TOKEN}"), "README.md: holds a token of the Hub; take it out"),
        (folder("lookalike", "hf_" + "aB3" * 11), "README.md: holds a token of the Hub; take it out"),
        (folder("licence", "---\nlicense: mine\n---\n"), 'README.md: the Hub refuses the card: found "license" must be one of ['),
        (folder("yaml", "---\na: [\n---\n"), "README.md: front matter that is no YAML table: found while parsing"),
        (folder("list", "---\n- a\n---\n"), "README.md: front matter that is no YAML table: found repo card metadata block should be"),
    ]
    wrong = [cases[0][0], "style"], [cases[0][0], "a/b--c"]
    rans = run(ada, *([path, "ada/style", "--base-model", "ada/base"] for path, _ in cases), *wrong)
    for ran, (_, said) in zip(rans, cases, strict=False):
        assert ran.code == 1 and f"Error: {said}" in ran.err, (ran.err, said)
    for ran in rans[-2:]:
        assert ran.code == 2 and "expected user/repo" in ran.err
    assert "ada/style" not in hub.repositories and not hub.asked("POST /api/repos") and not hub.asked("PUT")


def test_the_licence_of_a_base_that_is_only_here(hub: Hub, ada: Client, made: Path) -> None:
    (made / "base/README.md").write_text("---\nlicense: mit\n---\n")
    words = [made / "adapter", "ada/style", "--dry-run", "--json", "--base-model"]
    here, unknown = run(ada, [*words, "ada/secret"], [*words, "ada/base"])
    assert json.loads(here.out)["license"] == "mit" and "the Hub has no model ada/secret that this token may see" in here.err
    assert json.loads(unknown.out)["license"] == "llama3.1"
    assert "% of base and adapter |" in json.loads(here.out)["card"]
