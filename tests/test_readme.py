"""The README is true: its two commands, the commands in its table, its Python, the demo's output and its links."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from loratools.cli import COMMANDS, run
from tests.files import llama_config, llama_tensors, peft_config, write_adapter, write_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = re.findall(r"^\| `(loratools [^`]+)`", README, re.MULTILINE)
UP = "model.layers.1.mlp.up_proj"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme, pins = _module(ROOT / ".ci/readme.py"), _module(ROOT / ".ci/pins.py")


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base/, tuned/ and style/ as the README's commands name them, in the working directory."""
    generator = torch.Generator().manual_seed(1)
    base = llama_tensors(hidden=16)
    tuned = {name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in base.items()}
    write_checkpoint(tmp_path / "base", base, llama_config(hidden_size=16))
    write_checkpoint(tmp_path / "tuned", tuned, llama_config(hidden_size=16))
    rows, columns = base[f"{UP}.weight"].shape
    factors = {"A": torch.randn(2, columns, generator=generator), "B": torch.randn(rows, 2, generator=generator)}
    tensors = {f"base_model.model.{UP}.lora_{letter}.weight": factor for letter, factor in factors.items()}
    write_adapter(tmp_path / "style", tensors, peft_config(target_modules=["up_proj"], layers_to_transform=[1]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_two_commands_for_a_fresh_machine() -> None:
    demo, tests = readme.commands(README)
    assert demo.endswith("&& loratools demo")
    assert "&& pytest" in tests
    assert '".[demo]"' in demo
    assert '".[test]"' in tests


def test_every_install_uses_the_pins() -> None:
    installs = re.findall(r"pip install[^`\n]*", README)
    assert len(installs) >= 2
    assert all("-c constraints.txt" in line for line in installs if line.strip() != "pip install")


def test_only_the_two_commands_stand_in_shell_blocks() -> None:
    """Other blocks are output or Python: nothing else looks like something to paste into a shell."""
    languages = [block for block in re.findall(r"^```(\w*)\n", README, re.MULTILINE) if block]
    assert sorted(languages) == ["python", "sh", "sh", "text"]


@pytest.mark.parametrize(
    "text",
    [
        "```sh\npip install .\n```\n",  # one alone
        "```sh\na\n```\n```sh\nb\nc\n```\n",  # two lines in one
        "```sh\na\n```\n```bash\nb\n```\n```console\nc\n```\n",  # three
    ],
)
def test_a_readme_with_other_than_two_commands_is_refused(text: str) -> None:
    with pytest.raises(SystemExit, match="exactly two shell blocks"):
        readme.commands(text)


def test_the_commands_of_the_table_do_what_they_say(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {line.split()[1] for line in USAGE} == set(COMMANDS) - {"demo"}
    for line in USAGE:
        assert run(line.split()[1:]) == 0, line
        printed = capsys.readouterr().out
        if "--json" in line:
            assert json.loads(printed)["modules"]
        if " -o " in line:
            out = room / line.split(" -o ")[1].split()[0]
            assert (out / "loratools.json").is_file() or (out.suffix == ".html" and out.stat().st_size)
    merged = json.loads((room / "mixed/loratools.json").read_text())
    assert merged["applied"] == merged["expected"] == len(llama_tensors()) + 1


def test_the_python_of_the_readme_runs(room: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    count = len(llama_tensors())
    assert printed.getvalue().splitlines()[0] == f"applied {count}/{count}"
    assert len(printed.getvalue().splitlines()) == count + 1


def _masked(text: str) -> list[str]:
    """The words of each line with numbers and what hangs on their size taken out."""
    lines = (re.sub(r"[<>]?\d[\d,.]*(e[-+]\d+)?( [kMGT]?B\b)?", "#", line) for line in text.splitlines())
    return [" ".join(re.sub(r"[─━═-]{2,}", "--", line).split()) for line in lines]


def test_the_demo_still_prints_what_the_readme_shows() -> None:
    """All but the numbers, which vary with the processor: python .ci/readme.py excerpt brings it up to date."""
    shown = readme.excerpt(README)
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "loratools", "demo"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert _masked(done.stdout) == _masked(shown)
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()] == []


def test_the_pins_check_knows_a_stray_package(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = pins.pins()
    assert pinned["torch"] == "2.13.0"
    monkeypatch.setattr(pins, "distributions", _installed({"torch": "2.13.0+cpu", "Rich": pinned["rich"], "pip": "1", "nvidia-nccl": "2"}))
    assert pins.strays() == []
    monkeypatch.setattr(pins, "distributions", _installed({"torch": "2.12.0", "left_over": "1.0"}))
    assert pins.strays() == ["left-over 1.0, pinned: None", "torch 2.12.0, pinned: 2.13.0"]


def _installed(versions: dict[str, str]) -> Callable[[], list[object]]:
    class Found:
        def __init__(self, name: str, version: str) -> None:
            self.metadata, self.version = {"Name": name}, version

    return lambda: [Found(*pair) for pair in versions.items()]
