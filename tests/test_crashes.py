"""A merge that fails, or is killed, at any moment: OUT is absent or complete, and the next run gives the same bytes as a clean one."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import LoratoolsError, OutputError
from loratools.ops.convert import convert
from loratools.ops.merge import merge
from tests.conftest import llama_config, llama_tensors
from tests.files import write_checkpoint
from tests.spoil import Pair


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output but its receipt, which tells the time it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "loratools.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """A base in two shards with a side file, and its adapter."""
    made = Pair(tmp_path)
    made.sharded()
    (made.base / "tokenizer.json").write_text("{}")
    return made


@pytest.fixture
def clean(pair: Pair) -> dict[str, bytes]:
    merge(pair.base, pair.adapter, pair.folder / "clean")
    return contents(pair.folder / "clean")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate", "open", "mkdir", "replace", "rename"])
def test_any_call_may_fail(pair: Pair, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: str, overwrite: bool) -> None:
    """The n-th os.CALL finds the disk full, for every n of a merge; what OUT held before is not lost either."""
    real, failing = getattr(os, call), 0
    while True:
        failing += 1
        if overwrite:
            write_checkpoint(pair.out, llama_tensors(), llama_config())
        before = contents(pair.out) if overwrite else {}
        count = 0

        def fails(*arguments: Any, number: int = failing, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            try:
                merge(pair.base, pair.adapter, pair.out, overwrite=overwrite, threads=1)
            except OutputError as error:
                assert "No space left on device" in str(error)
                assert str(pair.out) in str(error)
            except Exception as error:
                assert call == "open" and "No space" in str(error), error  # an input that cannot be opened
        assert contents(pair.out) in (before, clean)
        if count < failing:
            break
        merge(pair.base, pair.adapter, pair.out, overwrite=True)
        assert contents(pair.out) == clean
        names = {path.name for path in pair.folder.iterdir()}
        assert names == {"base", "adapter", "clean", "out"}
        for path in sorted(pair.out.rglob("*"), reverse=True):
            path.unlink()
        pair.out.rmdir()
    assert failing > {"replace": 1, "rename": 1 if overwrite else 0}.get(call, 2)


@pytest.mark.parametrize("format", ["kohya", "mlx"])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate", "preadv"])
def test_any_call_of_a_conversion_may_fail(pair: Pair, monkeypatch: pytest.MonkeyPatch, call: str, format: str) -> None:
    """In whichever thread it fails: the n-th os.CALL, for every n; OUT is absent, with nothing beside it, or whole."""
    real, failing, lock, told = getattr(os, call), 0, threading.Lock(), list[str]()
    convert(pair.adapter, pair.folder / "clean", format=format)
    clean = contents(pair.folder / "clean")
    while not pair.out.exists():
        failing += 1
        count = 0

        def fails(*arguments: Any, number: int = failing, **options: Any) -> Any:
            nonlocal count
            with lock:
                count += 1
                now = count == number
            if now:
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fails)
            try:
                convert(pair.adapter, pair.out, format=format)
            except LoratoolsError as error:
                assert "Input/output error" in str(error) and count >= failing
                # the last sync is of the folder that OUT was already renamed into
                assert {path.name for path in pair.folder.iterdir()} - {"out"} == {"base", "adapter", "clean"}
                assert contents(pair.out) in ({}, clean)
                told.append(str(error))
    assert contents(pair.out) == clean and told


def test_a_short_write_goes_on_where_it_stopped(pair: Pair, clean: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, memoryview(data)[:7], offset))
    merge(pair.base, pair.adapter, pair.out)
    assert contents(pair.out) == clean


KILLER = """
import os, signal, sys, time
import torch
from loratools.ops.merge import merge
import loratools.linalg.exact, loratools.linalg.product
torch.set_num_threads(1)
real = os.pwrite
def slow(*arguments):
    time.sleep(0.003)
    return real(*arguments)
os.pwrite = slow
for line in sys.stdin:
    child = os.fork()
    if not child:
        merge(*sys.argv[1:], threads=1)
        os._exit(0)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_a_killed_merge_leaves_no_output_and_the_next_clears_up(pair: Pair, clean: dict[str, bytes]) -> None:
    """kill -9 at a dozen moments of a merge that is slowed down to some tenths of a second."""
    command = [sys.executable, "-c", KILLER, str(pair.base), str(pair.adapter), str(pair.out)]
    statuses = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin
        assert killer.stdout
        for step in range(12):
            print(0.001 + 0.012 * step, file=killer.stdin, flush=True)
            statuses.append(int(killer.stdout.readline()))
            left = {path.name for path in pair.folder.iterdir()} - {"base", "adapter", "clean", "out"}  # out whole, its room not yet gone
            assert contents(pair.out) in ({}, clean)
            assert len(left) <= 1, "a run clears what the one before it left"
            if pair.out.exists():
                break
        killer.stdin.close()
    assert statuses.count(signal.SIGKILL) >= 3
    merge(pair.base, pair.adapter, pair.out, overwrite=True)
    assert contents(pair.out) == clean
    assert {path.name for path in pair.folder.iterdir()} == {"base", "adapter", "clean", "out"}


def test_an_interrupted_merge_leaves_nothing(pair: Pair) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(pair.base, pair.adapter, pair.out, progress=interrupt)
    assert {path.name for path in pair.folder.iterdir()} == {"base", "adapter"}
