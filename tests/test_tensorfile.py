"""tensorfile: what it writes is the safetensors library's own bytes, what it reads that library reads, and no header crashes it."""

from __future__ import annotations

import ctypes
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from loratools.errors import Faults, FormatError
from loratools.tensorfile import BITS, HEADER_LIMIT, InMemory, Ref, Reshaped, Spec, TensorFile, parse_header
from loratools.tensorwriter import TensorWriter, canonical

# the safetensors library's names for what it can write; it reads the two F6 dtypes but has no name to write them by
LIBRARY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
WHOLE = tuple(dtype for dtype in LIBRARY if dtype != "F4")
Tensors = dict[str, tuple[Spec, bytes]]


@st.composite
def specs(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(BITS)) -> Spec:
    """Any dtype, any shape of up to three axes, empty and 0-d ones among them, that fills whole bytes."""
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    while BITS[dtype] < 8 and Spec(dtype, shape).numel * BITS[dtype] % 8:
        shape = (*shape, 4)
    return Spec(dtype, shape if shape or BITS[dtype] >= 8 else (4,))


def tensors_of(dtypes: tuple[str, ...] = tuple(BITS)) -> st.SearchStrategy[Tensors]:
    # Cs: no half surrogate pairs, which UTF-8 cannot hold; all else is a name, quotes and newlines too
    name = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda text: text != "__metadata__")
    return st.dictionaries(name, specs(dtypes), max_size=6).map(
        lambda table: {name: (spec, random.Random(repr(name)).randbytes(spec.nbytes)) for name, spec in table.items()}
    )


def library_bytes(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """The file the safetensors library makes of these tensors."""
    kept, described = [], {}
    for name, (spec, data) in tensors.items():
        buffer = ctypes.create_string_buffer(data, max(1, len(data)))
        kept.append(buffer)
        shape = [*spec.shape[:-1], spec.shape[-1] // 2] if spec.dtype == "F4" else list(spec.shape)
        described[name] = TensorSpec(dtype=LIBRARY[spec.dtype], shape=shape, data_ptr=ctypes.addressof(buffer), data_len=len(data))
    return bytes(serialize(described, metadata))


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> TensorWriter:
    path.unlink(missing_ok=True)
    writer = TensorWriter(path, {name: spec for name, (spec, _) in tensors.items()}, metadata)
    for name, (_, data) in tensors.items():
        writer.write(name, [data[:3], data[3:]])
    writer.close()
    return writer


def file_of(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


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


# -- headers that lie


@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_a_mutated_header_is_read_as_the_library_reads_it_or_refused(place: Path, chance: random.Random, count: int) -> None:
    """100 examples of ten mutations each: FormatError or nothing, and never a file that the library refuses."""
    tensors: Tensors = {"a": (Spec("F32", (2, 3)), bytes(24)), 'b"é': (Spec("I8", ()), b"\x01"), "c": (Spec("BF16", (0, 4)), b"")}
    pristine = library_bytes(tensors, {"k": "v"})
    alphabet = b'0123456789{}[]",:.-+eE\\ntfu\x00\xff\xc3 __metadata__shapedtypeF32'
    for _ in range(10):
        mutated = bytearray(pristine)
        for _ in range(count):
            at = chance.randrange(len(mutated) - 25)
            kind = chance.randrange(4)
            if kind == 0:
                mutated[at] = chance.choice(alphabet)
            elif kind == 1:
                del mutated[at : at + chance.randrange(1, 9)]
            elif kind == 2:
                mutated[at:at] = bytes(chance.choices(alphabet, k=chance.randrange(1, 9)))
            else:
                mutated[at] ^= 1 << chance.randrange(8)
        place.write_bytes(mutated)
        try:
            opened = TensorFile(place)
        except (FormatError, Faults) as error:
            assert all(isinstance(fault, FormatError) and fault.file == place for fault in getattr(error, "errors", [error]))
            continue
        read = {name: (ref.spec.dtype, list(ref.spec.shape), bytes(ref.read())) for name, ref in opened.items()}
        try:
            found = {name: (entry["dtype"], entry["shape"], bytes(entry["data"])) for name, entry in deserialize(bytes(mutated))}
        except SafetensorError as error:
            assert "-0" in str(error)  # JSON's -0 is 0 to Python and a float to the library: nothing is misread
        else:
            assert read == found


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"", "does not begin"),
        (b"[]", "does not begin"),
        (b"{", "not JSON"),
        (b'{"\xff": 1}', "not JSON"),
        (b"{" * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": 1}', "a: the header names something twice"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "not Unicode"),
        (b'{"__metadata__": {"\\udfff": "1"}}', "strings to strings"),
        ({"a": []}, "exactly dtype, shape and data_offsets"),
        ({"a": {**ENTRY, "more": 1}}, "exactly dtype, shape and data_offsets"),
        ({"a": {**ENTRY, "dtype": "F33"}}, "unknown dtype"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, "unknown dtype"),
        ({"a": {**ENTRY, "shape": [-2]}}, "natural numbers"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "natural numbers"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "natural numbers"),
        ({"a": {**ENTRY, "shape": 2}}, "natural numbers"),
        ({"a": {**ENTRY, "shape": [10**30]}}, "natural numbers"),
        ({"a": {**ENTRY, "shape": [1 << 40, 1 << 40, 0]}}, "more elements than a file can hold"),
        ({"a": {**ENTRY, "shape": [1 << 59] * 10_000}}, "more elements than a file can hold"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "do not fit"),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, "natural numbers"),
        ({"a": {**ENTRY, "data_offsets": [0, 4]}}, "do not fit"),
        ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}, "do not fit"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, "hole or overlap"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, "b: data_offsets leave a hole or overlap"),
        ({"a": ENTRY, "b": ENTRY}, "b: data_offsets leave a hole or overlap"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 16]}}, "truncated"),
        ({}, "bytes after the last tensor"),
        ({"__metadata__": {"a": 1}, "a": ENTRY}, "strings to strings"),
        ({"__metadata__": [], "a": ENTRY}, "strings to strings"),
    ],
)
def test_a_header_that_lies_is_refused(place: Path, header: object, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        TensorFile(file_of(place, header, bytes(8)))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{place}: ")


def test_every_fault_of_a_header_is_told() -> None:
    header = json.dumps({"a": {**ENTRY, "dtype": "F33"}, "b": {**ENTRY, "shape": [-1]}}).encode()
    with pytest.raises(ValueError, match=r"a: unknown dtype.*\nb: shape"):
        parse_header(header, 8)


def test_a_truncated_file_is_refused_wherever_it_ends(place: Path) -> None:
    whole = library_bytes({"a": (Spec("F32", (2,)), bytes(8)), "b": (Spec("U8", (3,)), bytes(3))})
    for length in range(len(whole)):
        place.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            TensorFile(place)


@pytest.mark.parametrize("count", [1 << 63, HEADER_LIMIT + 1])
def test_a_header_of_absurd_length_is_not_waited_for(place: Path, count: int) -> None:
    place.write_bytes(struct.pack("<Q", count) + b"{}")
    with pytest.raises(FormatError, match="no header's length"):
        TensorFile(place)


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


# -- refs


def refs(place: Path) -> Iterator[Callable[[Spec, bytes], Ref]]:
    def in_file(spec: Spec, data: bytes) -> Ref:
        write(place, {"before": (Spec("U8", (5,)), b"12345"), "a": (spec, data)})
        return TensorFile(place)["a"]

    yield InMemory
    yield in_file
    yield lambda spec, data: Reshaped(InMemory(Spec(spec.dtype, (spec.numel,)), data), spec)


@given(specs(tuple(dtype for dtype in BITS if BITS[dtype] >= 8)), st.integers(1, 40), st.data())
def test_rows_and_blocks_are_parts_of_the_bytes(place: Path, spec: Spec, size: int, draw: st.DataObject) -> None:
    data = random.Random(1).randbytes(spec.nbytes)
    count, step = spec.matrix[0], spec.row_bytes()
    start = draw.draw(st.integers(0, count))
    stop = draw.draw(st.integers(start, count))
    for make in refs(place):
        ref = make(spec, data)
        assert bytes(ref.read()) == data
        assert bytes(ref.rows(start, stop)) == data[start * step : stop * step]
        assert b"".join(bytes(block) for block in ref.blocks(size)) == data
        buffer = bytearray((stop - start) * step)
        ref.readinto(start, stop, memoryview(buffer))
        assert buffer == data[start * step : stop * step]
        assert bytes(ref.reshape(spec.numel).read()) == data


@given(st.sampled_from([dtype for dtype in BITS if BITS[dtype] >= 8]), st.integers(0, 5), st.integers(0, 5))
def test_the_transpose_moves_cells_whole_and_back(dtype: str, rows: int, columns: int) -> None:
    width = BITS[dtype] // 8
    data = random.Random(2).randbytes(rows * columns * width)
    ref = InMemory(Spec(dtype, (rows, columns)), data)
    cells = [data[at * width : (at + 1) * width] for at in range(rows * columns)]
    assert bytes(ref.T.read()) == b"".join(cells[row * columns + column] for column in range(columns) for row in range(rows))
    assert ref.T.spec.shape == (columns, rows)
    assert ref.T.T is ref


def test_rows_that_share_a_byte_are_not_cut(place: Path) -> None:
    ref = InMemory(Spec("F4", (2, 3)), b"abc")
    assert bytes(ref.read()) == b"abc"
    with pytest.raises(FormatError, match="share bytes"):
        ref.rows(0, 1)


def test_a_file_is_read_in_blocks_through_one_buffer(place: Path) -> None:
    write(place, {"a": (Spec("U8", (10, 10)), bytes(range(100)))})
    seen = [(memoryview(block).nbytes, id(memoryview(block).obj)) for block in TensorFile(place)["a"].blocks(40)]
    assert [size for size, _ in seen] == [40, 40, 20]
    assert len({buffer for _, buffer in seen}) == 1


def test_metadata_that_is_null_is_none(place: Path) -> None:
    """As MLX writes it; the library's own reader takes it too."""
    from safetensors import safe_open

    opened = TensorFile(file_of(place, {"__metadata__": None, "a": ENTRY}, bytes(8)))
    assert opened.metadata == {} and list(opened) == ["a"]
    with safe_open(place, "np") as theirs:
        assert theirs.metadata() is None and list(theirs.keys()) == ["a"]


def test_a_literal(place: Path) -> None:
    """The format's own bytes, as its README tells them: length, JSON padded to 8 bytes, data."""
    write(place, {"a": (Spec("U8", (2,)), b"\x01\x02")}, {"format": "pt"})
    header = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}    '
    assert place.read_bytes() == b"\x58\0\0\0\0\0\0\0" + header + b"\x01\x02"
