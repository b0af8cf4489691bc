"""loratools unmerge as a user sees it: what it says, what it refuses, and that the base is back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli._adapters import llama_adapter
from tests.cli._adapters import loratools as run
from tests.files import llama_config, llama_tensors, write_checkpoint


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = write_checkpoint(tmp_path / "base", llama_tensors(torch.bfloat16), llama_config(), shards=2)
    found = run("merge", base, llama_adapter(tmp_path / "adapter"), "-o", tmp_path / "merged", "--reversible")
    assert found.returncode == 0
    told = json.loads((tmp_path / "merged" / "loratools.json").read_text())["unmerge"]
    (line,) = [line for line in found.stdout.splitlines() if line.startswith("undone by")]
    assert "unmerge.safetensors, " in line and f"{100 * told['share']:.0f}"[:2] in line
    return tmp_path / "merged"


def test_the_base_is_back(tmp_path: Path, merged: Path) -> None:
    found = run("unmerge", merged, "-o", tmp_path / "again")
    assert (found.returncode, found.stderr) == (0, "")
    facts = {line.split("  ")[0].strip(): line.split("  ", 1)[1].strip() for line in found.stdout.splitlines()}
    assert facts["removed"] == "4 of 4 deltas"
    assert facts["restored"] == "4 of 17 tensors; every byte is the base's"
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_json_and_an_adapter_elsewhere(tmp_path: Path, merged: Path) -> None:
    (tmp_path / "adapter").rename(tmp_path / "moved")
    refused = run("unmerge", merged, "-o", tmp_path / "again")
    assert refused.returncode == 1 and "is not where it was; give the adapter" in refused.stderr and refused.stderr.count("\n") == 1
    found = run("unmerge", merged, "-o", tmp_path / "again", "--adapter", tmp_path / "moved", "--json")
    assert json.loads(found.stdout) == json.loads((tmp_path / "again" / "loratools.json").read_text())


def test_subtracting_says_how_near(tmp_path: Path, merged: Path) -> None:
    (merged / "unmerge.safetensors").unlink()
    refused = run("unmerge", merged, "-o", tmp_path / "near")
    assert refused.returncode == 1 and "no record to undo a merge by" in refused.stderr
    found = run("unmerge", merged, "-o", tmp_path / "near", "--approximate", "--adapter", tmp_path / "adapter")
    assert "subtracted, not restored: a weight can differ from the original by up to" in found.stderr
    assert "subtracted: no weight is off by more than" in found.stdout
