"""A run that is told to stop exits with the code shells expect, and leaves nothing at OUT or beside it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.cli._signals import ENDING, stop_on_signals
from tests.cli._adapters import command, environment, llama_adapter
from tests.files import write_checkpoint

# fails from the start in a shell that ignores SIGINT for its background jobs, unless the child asks for the default again
DEFAULT: dict[str, Any] = {"preexec_fn": lambda: [signal.signal(number, signal.SIG_DFL) for number in ENDING]}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A base of 0.3 GB whose merge takes a second or more, and an adapter for all of it."""
    folder = tmp_path_factory.mktemp("large")
    tensors = {
        f"model.layers.{layer}.self_attn.{name}_proj.weight": torch.full((height, 2048), 0.5, dtype=torch.bfloat16)
        for layer in range(24)
        for name, height in (("q", 2048), ("v", 1024))
    }
    base = write_checkpoint(folder / "base", tensors, {"model_type": "llama"})
    yield base, llama_adapter(folder / "adapter", hidden=2048, layers=24)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("times", [1, 3])
def test_a_stopped_merge_leaves_no_output(large: tuple[Path, Path], tmp_path: Path, number: signal.Signals, code: int, times: int) -> None:
    room = tmp_path / "room"
    room.mkdir()
    arguments = command("merge", *large, "-o", room / "out", "--threads", "2")
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(arguments, env=environment(), **streams, **DEFAULT)
    deadline = time.monotonic() + 60
    while not any(room.rglob("*.safetensors")):  # it is writing
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    for _ in range(times):
        run.send_signal(number)
        time.sleep(0.02)
    out, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert out == "" and "Traceback" not in err
    assert not list(room.iterdir())


def test_a_signal_that_was_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
