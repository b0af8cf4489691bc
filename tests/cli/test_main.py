"""The frame of the command line: exit codes, one line a fault, what help and version cost and say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loratools import __version__
from loratools.cli import COMMANDS, SHOWN, told
from loratools.errors import Faults, FormatError
from tests.cli._adapters import command, environment, llama_adapter, loratools
from tests.files import write_adapter


def test_help_lists_every_command_and_imports_none_of_them() -> None:
    code = (
        "import sys\nfrom loratools.cli import run\nassert run(['--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'safetensors', 'huggingface_hub', 'blake3', 'loratools.formats'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('loratools.cli.') and '._' not in name]"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert found.returncode == 0, found.stderr
    for name, line in COMMANDS.items():
        assert f"  {name}" in found.stdout and line in found.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_no_operation(name: str) -> None:
    code = (
        f"import sys\nfrom loratools.cli import run\nassert run([{name!r}, '--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'huggingface_hub', 'loratools.formats', 'loratools.ops.inspect'}\n"
        "work = {name for name in sys.modules if name.startswith('loratools.workflows.') and '.targets' not in name}\n"
        "assert not (work | heavy & set(sys.modules)), work | heavy & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert found.returncode == 0, found.stderr


def test_version() -> None:
    found = loratools("--version")
    assert (found.returncode, found.stdout) == (0, f"loratools {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("merge", "base/"),
        ("merge", "base/", "adapter/"),
        ("inspect",),
        ("inspect", "x", "--no-such-option"),
        ("extract", "a", "b"),
        ("extract", "a", "b", "-o", "c"),
        ("extract", "a", "b", "-o", "c", "--rank", "2", "--energy", "0.9"),
        ("resize", "a", "-o", "c"),
        ("resize", "a", "-o", "c", "--max-error", "0.1", "--size", "1MB"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]) -> None:
    found = loratools(*arguments)
    assert found.returncode == 2
    assert found.stdout == "" and "Error: " in found.stderr and "Traceback" not in found.stderr


def test_a_fault_is_one_line_and_exit_1(tmp_path: Path) -> None:
    found = loratools("inspect", tmp_path / "none")
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == f"Error: {tmp_path / 'none'}: no such file or folder\n"


def test_with_json_a_fault_leaves_stdout_empty(tmp_path: Path) -> None:
    found = loratools("inspect", tmp_path / "none", "--json")
    assert (found.returncode, found.stdout) == (1, "")


def test_at_most_ten_faults_then_a_count(tmp_path: Path) -> None:
    strays = {f"base_model.model.stray.{index}": torch.zeros(2) for index in range(14)}
    adapter = write_adapter(tmp_path / "adapter", strays, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    found = loratools("inspect", adapter)
    lines = found.stderr.splitlines()
    assert found.returncode == 1
    assert len(lines) == SHOWN + 1 and all(line.startswith("Error: ") for line in lines)
    assert all(str(adapter) in line and "stray." in line for line in lines[:SHOWN])
    assert lines[-1] == "Error: … and 4 more faults"


def test_errors_of_the_system_and_of_memory_are_lines_too(tmp_path: Path) -> None:
    try:
        (tmp_path / "none").read_bytes()
    except OSError as error:
        assert told(error) == [f"{tmp_path / 'none'}: No such file or directory"]
    assert told(MemoryError()) is not None
    assert told(torch.OutOfMemoryError("CUDA out of memory")) is not None
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(1 << 60)
    assert told(allocation.value) == told(MemoryError())


def test_a_bug_is_not_dressed_up_as_a_fault() -> None:
    assert told(KeyError("rank")) is None and told(RuntimeError("expected scalar type")) is None


def test_a_fault_of_several_is_told_by_its_parts() -> None:
    assert told(Faults([FormatError("one", file="a"), FormatError("two", file="b")])) == ["a: one", "b: two"]


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", layers=1000)  # 500 kB of JSON, beyond what a pipe and its reader hold
    reader = subprocess.Popen(["head", "-n", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    writer = subprocess.Popen(
        command("inspect", adapter, "--json"), stdout=reader.stdin, stderr=subprocess.PIPE, text=True, env=environment()
    )  # fmt: skip
    assert reader.stdin is not None and reader.stdout is not None and writer.stderr is not None
    reader.stdin.close()
    assert reader.stdout.read() == "{\n"
    assert (writer.stderr.read(), writer.wait(60), reader.wait(60)) == ("", 1, 0)


def test_a_terminal_without_our_signs_still_gets_the_numbers(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    found = subprocess.run(
        command("inspect", adapter, "--spectra"), capture_output=True, env=environment() | {"PYTHONIOENCODING": "latin-1"}
    )
    assert found.returncode == 0, found.stderr
    text = found.stdout.decode("latin-1")
    assert "?W?" in text and "4 × 8" in text  # Latin-1 has no ‖ and no Δ, but ×


def test_json_is_one_document_in_utf8_whatever_the_names(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "Größe-模型")
    found = subprocess.run(command("inspect", adapter, "--json"), capture_output=True, env=environment() | {"PYTHONIOENCODING": "utf-8"})
    assert json.loads(found.stdout)["path"] == str(adapter)
