"""record: what goes in comes out; every bit of the file is held by a digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import LoratoolsError
from loratools.record import Record, Spool, record_path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    spool = Spool(tmp_path)
    spool.put("b", [b"later, ", b"", b"in parts"])
    spool.put("a", [bytes(range(256))])
    spool.put("none", [])
    spool.put("c", [b"forgotten"])
    spool.drop("c")
    spool.drop("never there")
    assert spool.write(tmp_path / "x.safetensors", {"answer": 42, "name": "ñ\udc80"}) == (tmp_path / "x.safetensors").stat().st_size
    return tmp_path / "x.safetensors"


def test_what_goes_in_comes_out(path: Path) -> None:
    record = Record(path)
    assert record.table["answer"] == 42 and record.table["name"] == "ñ\udc80"
    assert bytes(record.blob("a").read()) == bytes(range(256))
    assert bytes(record.blob("b").read()) == b"later, in parts"
    assert record.blob("none").spec.nbytes == 0
    with pytest.raises(LoratoolsError, match=r"x\.safetensors: c: the record lacks it"):
        record.blob("c")
    assert [item.name for item in path.parent.iterdir()] == ["x.safetensors"]


def test_every_bit_counts(path: Path) -> None:
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        with pytest.raises(LoratoolsError):
            Record(path)
    path.write_bytes(data)
    Record(path)


def test_the_length_of_the_header_counts_whole(path: Path) -> None:
    data = path.read_bytes()
    for bit in range(64):
        path.write_bytes(bytes([byte ^ (1 << bit % 8 if at == bit // 8 else 0) for at, byte in enumerate(data[:8])]) + data[8:])
        with pytest.raises(LoratoolsError):
            Record(path)


def test_another_file_is_no_record(tmp_path: Path, base: Path) -> None:
    with pytest.raises(LoratoolsError, match="not a record of a merge"):
        Record(base / "model.safetensors")


def test_where_it_lies() -> None:
    assert record_path(Path("out"), folder=True) == Path("out/unmerge.safetensors")
    assert record_path(Path("a/b.safetensors"), folder=False) == Path("a/b.safetensors.unmerge.safetensors")
