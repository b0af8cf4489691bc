"""--initial as a user gives it: what is said without it, and every command that takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli._adapters import llama_adapter
from tests.cli._adapters import loratools as run
from tests.conftest import llama_config, llama_tensors
from tests.files import read_adapter, write_adapter, write_checkpoint


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A base, and an adapter under CorDA's name with the one it began as."""
    write_checkpoint(tmp_path / "base", llama_tensors(), llama_config())
    tensors, config = read_adapter(llama_adapter(tmp_path / "first", init_lora_weights="corda"))
    write_adapter(tmp_path / "adapter", {key: tensor + 0.1 * torch.ones_like(tensor) for key, tensor in tensors.items()}, config)
    return tmp_path


def test_what_is_said_without_it(started: Path) -> None:
    found = run("merge", started / "base", started / "adapter", "-o", started / "out")
    assert found.returncode == 1 and "Traceback" not in found.stderr and not (started / "out").exists()
    assert "found corda; give the adapter as it was initialised with --initial, or save it with path_initial_model" in found.stderr


@pytest.mark.parametrize("words", [["convert"], ["resize", "--rank", "3"], ["rescale", "--bake"]], ids=lambda words: words[0])
def test_commands_that_write_an_adapter(started: Path, words: list[str]) -> None:
    name, *more = words
    found = run(name, started / "adapter", "-o", started / "out", "--initial", started / "first", *more)
    assert (found.returncode, found.stderr) == (0, "")
    receipt = json.loads((started / "out/loratools.json").read_text())
    assert receipt["arguments"]["initial"] == str(started / "first")
    assert [row["role"] for row in receipt["inputs"]] == ["adapter", "adapter", "initial", "initial"]
    assert json.loads((started / "out/adapter_config.json").read_text())["r"] == (3 if name == "resize" else 4)


def test_merge_and_inspect(started: Path) -> None:
    found = run("merge", started / "base", started / "adapter", "-o", started / "out", "--initial", started / "first")
    assert (found.returncode, found.stderr) == (0, "") and "4 of 4 deltas" in found.stdout
    told = json.loads(run("inspect", started / "adapter", "--initial", started / "first", "--json").stdout)
    assert told["ranks"] == {"4": 4} and {row["scaling"] for row in told["modules"]} == {2.0}
