"""tensorwriter: a file that is whole or refused, from any thread, on the disk when it is closed; its bytes are test_tensorfile's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from loratools import flushing
from loratools.errors import FormatError
from loratools.refs import Buffer, Spec
from loratools.tensorfile import TensorFile
from loratools.tensorwriter import TensorWriter


def test_a_new_file_gets_the_mode_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        writer = TensorWriter(tmp_path / "x", {"a": Spec("U8", (1,))})
        writer.write("a", [b"1"])
        writer.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        TensorWriter(tmp_path / "x", {})
    assert (tmp_path / "x").read_bytes() == b"kept"


@pytest.mark.parametrize(("blocks", "said"), [([b"123"], "fewer bytes"), ([b"12", b"345"], "more bytes"), ([], "fewer bytes")])
def test_bytes_that_do_not_fit_the_spec_are_refused(tmp_path: Path, blocks: list[Buffer], said: str) -> None:
    writer = TensorWriter(tmp_path / "x", {"a": Spec("U8", (4,))})
    with pytest.raises(FormatError, match=f"a: {said}"):
        writer.write("a", blocks)
    writer.abandon()


def test_a_tensor_never_written_is_said(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "x", {"a": Spec("U8", (4,)), "b": Spec("U8", (0,))})
    writer.write("b", [])
    with pytest.raises(FormatError, match="a: never written"):
        writer.close()


def test_a_tensor_cannot_take_the_metadatas_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot have this name"):
        TensorWriter(tmp_path / "x", {"__metadata__": Spec("U8", (4,))})


def test_the_header_may_be_told_anew(tmp_path: Path) -> None:
    """Of the same length it takes the place of the first; of another it would overwrite the tensors, and is refused."""
    writer = TensorWriter(tmp_path / "x", {"a": Spec("U8", (4,))}, {"hash": "0000", "kept": "é"})
    writer.write("a", [b"1234"])
    first = writer.header_sha256
    writer.restate({"hash": "abcd", "kept": "é"})
    with pytest.raises(FormatError, match="a header of another length"):
        writer.restate({"hash": "a longer one", "kept": "é"})
    writer.close()
    opened = TensorFile(tmp_path / "x")
    assert opened.metadata == {"hash": "abcd", "kept": "é"} and bytes(opened["a"].read()) == b"1234"
    assert opened.header_sha256 == writer.header_sha256 != first


@pytest.mark.parametrize("sync", [True, False])
def test_closing_syncs_unless_another_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    writer = TensorWriter(tmp_path / "x", {"a": Spec("U8", (4,))})
    writer.write("a", [b"1234"])
    writer.close(sync=sync)
    writer.close()  # once
    assert len(synced) == sync


def test_a_sync_under_way_that_fails_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing tells of it again: the system says each failure of a file once."""

    def fails(descriptor: int) -> None:
        raise OSError("lost")

    monkeypatch.setattr(flushing, "_sync", fails)
    monkeypatch.setattr(flushing, "EVERY", 2)
    for sync in (True, False):
        writer = TensorWriter(tmp_path / f"{sync}", {"a": Spec("U8", (4,))})
        writer.write("a", [b"1234"])
        with pytest.raises(OSError, match="lost"):
            writer.close(sync=sync)
        writer.abandon()
