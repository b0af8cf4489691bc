"""flushing: bytes go to the disk while more are written, one sync at a time, and no failure of one is lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from loratools import flushing
from loratools.flushing import Flushing


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that were synced, in turn."""
    seen: list[int] = []
    monkeypatch.setattr(flushing, "_sync", seen.append)
    return seen


def test_so_many_bytes_are_synced_at_once(synced: list[int]) -> None:
    flush = Flushing(7, every=10)
    for _ in range(4):
        flush.wrote(4)
    flush.finish()
    assert synced == [7]
    few = Flushing(8, every=10)
    few.wrote(9)
    few.finish()
    assert synced == [7], "a small file is left to the sync at its end"


def test_a_slow_disk_is_not_asked_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, running, seen = threading.Event(), threading.Event(), list[int]()

    def slow(descriptor: int) -> None:
        running.set()
        assert gate.wait(20)
        seen.append(descriptor)

    monkeypatch.setattr(flushing, "_sync", slow)
    flush = Flushing(7, every=10)
    flush.wrote(10)
    assert running.wait(20)
    for _ in range(9):
        flush.wrote(10)  # returns at once: no second sync waits behind the first
    gate.set()
    flush.finish()
    assert seen == [7]


@pytest.mark.parametrize("more", [False, True])
def test_a_sync_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, more: bool) -> None:
    """By the bytes that follow, or at the end: another sync of the file might succeed, though bytes of it are lost."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(flushing, "_sync", full)
    flush = Flushing(7, every=10)
    flush.wrote(10)
    flush.stop()
    with pytest.raises(OSError, match="No space left"):
        flush.wrote(10) if more else flush.finish()


def test_a_real_file(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    flush = Flushing(descriptor, every=1000)
    for _ in range(100):
        flush.wrote(os.write(descriptor, bytes(100)))
    flush.finish()
    os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == bytes(10_000)
