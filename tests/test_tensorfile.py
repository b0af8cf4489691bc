"""tensorfile: what is written is the safetensors library's own bytes, what is read that library reads; what is no file is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize

from loratools.errors import FormatError
from loratools.header import canonical
from loratools.refs import Spec
from loratools.tensorfile import TensorFile
from tests.library import WHOLE, Tensors, library_bytes, tensors_of, write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorfile") / "x.safetensors"


# -- beside the library


@given(tensors_of(WHOLE), st.dictionaries(st.text('aé\n"', max_size=3), st.text(max_size=5), max_size=1))
def test_canonical_order_gives_the_librarys_bytes(place: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    # one metadata entry at most: the library writes several in an order of its own that changes from call to call
    ordered = {name: tensors[name] for name in canonical({name: spec for name, (spec, _) in tensors.items()})}
    write(place, ordered, metadata or None)
    assert place.read_bytes() == library_bytes(tensors, metadata or None)


def test_four_bit_floats_give_the_librarys_bytes(place: Path) -> None:
    tensors = {"a": (Spec("F4", (3, 2)), b"\x01\x02\x03"), "b": (Spec("BF16", (1,)), b"\x04\x05")}
    write(place, {name: tensors[name] for name in ("b", "a")})
    assert place.read_bytes() == library_bytes(tensors)


@given(tensors_of(), st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
def test_the_library_reads_what_we_write_in_any_order(place: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    write(place, tensors, metadata)
    found = dict(deserialize(place.read_bytes()))
    assert {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in found.items()} == {
        name: (spec.dtype, spec.shape, data) for name, (spec, data) in tensors.items()
    }
    assert TensorFile(place).metadata == metadata


@given(tensors_of(WHOLE))
def test_we_read_what_the_library_writes(place: Path, tensors: Tensors) -> None:
    place.write_bytes(library_bytes(tensors, {"format": "pt"}))
    opened = TensorFile(place)
    assert {name: (ref.spec, bytes(ref.read())) for name, ref in opened.items()} == tensors
    assert opened.metadata == {"format": "pt"}


@given(tensors_of())
def test_our_own_files_come_back_in_their_order(place: Path, tensors: Tensors) -> None:
    writer = write(place, tensors)
    opened = TensorFile(place)
    assert {name: (ref.spec, b"".join(map(bytes, ref.blocks(7)))) for name, ref in opened.items()} == tensors
    # tensors of no bytes lie at the same offset as their neighbours, so their order is open
    assert [name for name in opened if tensors[name][1]] == [name for name in tensors if tensors[name][1]]
    assert (opened.size, opened.header_sha256) == (writer.size, writer.header_sha256)


# -- files


def test_what_is_no_file_is_refused_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, said in ((".", "a folder"), ("pipe", "a pipe"), ("loop", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(FormatError, match=said):
            TensorFile(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read_is_said(place: Path) -> None:
    write(place, {"a": (Spec("U8", (100,)), bytes(100))})
    ref = TensorFile(place)["a"]
    os.truncate(place, 100)
    with pytest.raises(FormatError, match="became shorter"):
        ref.read()


def test_a_file_is_read_in_blocks_through_one_buffer(place: Path) -> None:
    write(place, {"a": (Spec("U8", (10, 10)), bytes(range(100)))})
    seen = [(memoryview(block).nbytes, id(memoryview(block).obj)) for block in TensorFile(place)["a"].blocks(40)]
    assert [size for size, _ in seen] == [40, 40, 20]
    assert len({buffer for _, buffer in seen}) == 1


def test_a_literal(place: Path) -> None:
    """The format's own bytes, as its README tells them: length, JSON padded to 8 bytes, data."""
    write(place, {"a": (Spec("U8", (2,)), b"\x01\x02")}, {"format": "pt"})
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}    '
    assert place.read_bytes() == b"\x58\0\0\0\0\0\0\0" + header + b"\x01\x02"
