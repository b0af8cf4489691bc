"""Every command on repositories: the same as on the files themselves, under the repository's name and never the cache's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.files import llama_config, llama_tensors, write_checkpoint
from tests.hub.client import Client
from tests.hub.server import Hub
from tests.test_source import lora

# how an adapter may be named: REV is the commit of its repository
SPELT = (
    "ada/lora", "ada/lora@main", "ada/lora@REV", "hf://ada/lora", "hf://ada/lora/adapter_model.safetensors", "hf://ada/many/sub",
    "hf://ada/many@main/sub/adapter_model.safetensors",
)  # fmt: skip
# a command by what it is given: ADAPTER and OTHER, BASE and TUNED, MERGED (by the two), OUT
COMMANDS = {
    "check": "check ADAPTER --for vllm --json",
    "check on the base": "check ADAPTER --for peft --base BASE --json",
    "compare": "compare ADAPTER OTHER --json",
    "compare on the base": "compare ADAPTER OTHER --base BASE --json",
    "inspect": "inspect ADAPTER --base BASE --spectra --json",
    "fit": "fit ADAPTER --for vllm -o OUT",
    "convert": "convert ADAPTER --format kohya -o OUT.safetensors",
    "convert with the base": "convert ADAPTER --kind dora --base BASE -o OUT",
    "rescale": "rescale ADAPTER --by 2 -o OUT",
    "resize": "resize ADAPTER --rank 1 -o OUT",
    "combine": "combine ADAPTER:0.5 OTHER:-1 -o OUT",
    "report": "report ADAPTER OTHER --base BASE -o OUT.html",
    "merge": "merge BASE ADAPTER:0.5 OTHER -o OUT",
    "extract": "extract BASE TUNED --rank 2 -o OUT",
    "verify": "verify MERGED --base BASE --adapter ADAPTER --json",
    "unmerge": "unmerge MERGED -o OUT",
}


@pytest.fixture
def shelf(hub: Hub, client: Client, tmp_path: Path) -> Path:
    """lora/, other/, base/ (three shards) and tuned/ (two) here, and on the Hub as ada/lora and so on; lora/ also in ada/many as sub."""
    base, generator = llama_tensors(), torch.Generator().manual_seed(1)
    tuned = {name: W + torch.randn(W.shape, generator=generator) / 10 if W.ndim > 1 else W for name, W in base.items()}
    lora(tmp_path / "lora")
    lora(tmp_path / "other", factor=-0.5)
    write_checkpoint(tmp_path / "base", base, llama_config(), shards=3)
    write_checkpoint(tmp_path / "tuned", tuned, llama_config(), shards=2)
    for name in ("lora", "other", "base", "tuned"):
        hub.add(f"ada/{name}", tmp_path / name)
    hub.add("ada/many", {"README.md": b"# many\n"} | {f"sub/{name}": data for name, data in hub.repositories["ada/lora"].files.items()})
    return tmp_path


def run(client: Client, line: str, out: Path, **given: str | Path) -> str:
    """The command with its words filled in; returns what it printed. Nothing may name the cache."""
    words = [word for word in line.split() for word in [_filled(word, {"OUT": str(out), **{k: str(v) for k, v in given.items()}})]]
    done = client.loratools(*words)
    assert done.returncode == 0, (words, done.stderr)
    assert str(client.home) not in done.stdout + done.stderr
    return done.stdout


def _filled(word: str, given: dict[str, str]) -> str:
    found = re.match(r"[A-Z]{3,}", word)
    return given[found[0]] + word[found.end() :] if found else word


def written(out: Path) -> dict[str, bytes]:
    """What a command wrote beside its receipt, which tells names and times."""
    files = [path for path in out.parent.rglob("*") if path.is_file() and path.relative_to(out.parent).parts[0].startswith(out.name)]
    found = {path.relative_to(out.parent).as_posix(): path.read_bytes() for path in files if not path.name.endswith("loratools.json")}
    # an adapter that was extracted from a repository names it as its base
    return {name: data.replace(b'"ada/base"', b"null") for name, data in found.items()}


def without_names(text: str) -> object:
    """A report without the paths that it was given, and without what names a file of the base."""
    found = json.loads(text)
    return {key: value for key, value in found.items() if key not in ("path", "a", "b", "adapter", "base", "file", "target_file")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_does_the_same(hub: Hub, client: Client, shelf: Path, name: str) -> None:
    line, near, far = COMMANDS[name], shelf / "near" / "x", shelf / "far" / "x"
    for folder in (near, far):
        folder.parent.mkdir()
    if "MERGED" in line:
        run(client, "merge BASE ADAPTER -o OUT --reversible", shelf / "merged", BASE="ada/base", ADAPTER="ada/lora")
        hub.add("ada/merged", shelf / "merged")
    words = ("ADAPTER", "OTHER", "BASE", "TUNED", "MERGED")
    names = ("lora", "other", "base", "tuned", "merged")
    here = {word: shelf / of for word, of in zip(words, names, strict=True)}
    there = {word: f"ada/{of}" for word, of in zip(words, names, strict=True)}
    if name == "unmerge":
        here |= {"MERGED": shelf / "merged"}
    told = run(client, line, near, **here), run(client, line, far, **there)
    if name == "report":
        assert far.with_suffix(".html").stat().st_size > 500_000 and "ada/lora" in far.with_suffix(".html").read_text(encoding="utf-8")
        assert str(client.home) not in far.with_suffix(".html").read_text(encoding="utf-8")
    elif "OUT" in line:
        assert written(near) == written(far) != {}
        receipts = [path.read_text() for path in far.parent.rglob("*loratools.json")]
        assert receipts and not any(str(client.home) in text or str(shelf / "lora") in text for text in receipts)
    else:
        assert without_names(told[0]) == without_names(told[1])


@pytest.mark.parametrize("path", SPELT)
def test_an_adapter_by_every_spelling(hub: Hub, client: Client, shelf: Path, path: str) -> None:
    path = path.replace("REV", hub.repositories["ada/lora"].refs["main"])
    for folder in ("near", "far"):
        (shelf / folder).mkdir()
    run(client, "resize ADAPTER --rank 1 -o OUT", shelf / "near" / "x", ADAPTER=shelf / "lora")
    run(client, "resize ADAPTER --rank 1 -o OUT", shelf / "far" / "x", ADAPTER=path)
    assert written(shelf / "near" / "x") == written(shelf / "far" / "x")
    row = json.loads((shelf / "far/x/loratools.json").read_text())["inputs"][0]
    repo, inner = ("many", "sub/") if "many" in path else ("lora", "")
    commit = hub.repositories[f"ada/{repo}"].refs["main"]
    assert row["path"] == f"hf://ada/{repo}@{commit}/{inner}adapter_model.safetensors"


def test_a_base_by_its_index_and_by_one_of_its_files(client: Client, shelf: Path) -> None:
    for line in ("inspect BASE/model.safetensors.index.json --json", "inspect BASE/model-00001-of-00003.safetensors --json"):
        far, near = run(client, line, shelf, BASE="hf://ada/base"), run(client, line, shelf, BASE=shelf / "base")
        assert without_names(near) == without_names(far)


def test_a_repository_that_holds_adapters_in_folders_says_so(client: Client, shelf: Path) -> None:
    for words in (["inspect", "ada/many"], ["convert", "ada/many", "-o", shelf / "x"], ["check", "ada/many", "--for", "vllm"]):
        done = client.loratools(*words)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "holds adapters in folders of their own: found sub; name one of them as the path" in done.stderr, done.stderr


def test_the_python_api_names_the_repository(hub: Hub, client: Client, shelf: Path) -> None:
    save_file(load_file(shelf / "lora/adapter_model.safetensors") | {"stray": torch.ones(2)}, shelf / "lora/adapter_model.safetensors")
    commit = hub.add("ada/wrong", shelf / "lora")
    done = client.python("""
        import loratools
        calls = [
            lambda: loratools.load("ada/wrong"), lambda: loratools.inspect("ada/wrong"),
            lambda: loratools.inspect("ada/wrong", values=True),
            lambda: loratools.convert("ada/wrong", "x", format="kohya"), lambda: loratools.merge("ada/base", "ada/wrong", "x"),
            lambda: loratools.check("ada/wrong", "vllm"), lambda: loratools.report(["ada/lora", "ada/wrong"], "x"),
            lambda: loratools.compare("ada/lora", "ada/wrong"), lambda: loratools.Checkpoint("ada/wrong"),
        ]
        for call in calls:
            try:
                call()
            except loratools.LoratoolsError as error:
                print(error)
        print(loratools.load("ada/lora"))
        print(len(loratools.Checkpoint("ada/base")), loratools.Checkpoint("hf://ada/base/model-00001-of-00003.safetensors").single)
    """)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    named = f"hf://ada/wrong@{commit}/adapter_model.safetensors: stray: lacks the prefix"
    assert sum(line.startswith(named) for line in lines) == 7, lines
    assert lines[1].startswith("hf://ada/wrong/adapter_model.safetensors: stray: ")  # its header alone was read
    assert lines[8].startswith("ada/wrong: ") and "Adapter: 2 tensors" in lines[9] and "hf://ada/lora@" in lines[9]
    assert lines[-1].startswith("17 ") and str(client.home) not in done.stdout


def test_what_a_repository_cannot_be(client: Client, shelf: Path) -> None:
    cases = {
        "inspect hf://ada/lora/adapter_config.json": "hf://ada/lora/adapter_config.json: not a safetensors file",
        "merge ada/base ada/none -o OUT": "no such repository at",
        "merge ada/none ada/lora -o OUT": "no such repository at",
        "merge ada/base ada/lora@gone -o OUT": "ada/lora@gone: the repository has no such revision: found gone",
        "extract ada/base ada/lora -o OUT --rank 2": "Error: ",
        "report ada/base -o OUT.html": "Error: ",
        "report ada/lora ada/lora -o OUT.html": "Error: ada/lora: given twice",
        "report ada/lora hf://ada/lora -o OUT.html": "Error: ada/lora: given twice",
        "verify ada/lora": "Error: ada/lora: no receipt beside it; give --base and --adapter",
        "unmerge ada/base -o OUT": "Error: ",
        "merge ada/base hf://ada/lora/gone -o OUT": "the repository has no such file or folder; it has adapter_config.json",
    }
    for line, said in cases.items():
        done = client.loratools(*[word.replace("OUT", str(shelf / "out")) for word in line.split()])
        assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr, (line, done.stderr)
        assert str(client.home) not in done.stderr, done.stderr
        assert not (shelf / "out").exists() and not (shelf / "out.html").exists()
