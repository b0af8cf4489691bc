"""header: none that lies is read, none crashes the reader, and what is built is parsed again."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from loratools.errors import Faults, FormatError
from loratools.header import HEADER_LIMIT, build_header, canonical, parse_header
from loratools.refs import BITS, Spec
from loratools.tensorfile import TensorFile
from tests.library import Tensors, file_of, library_bytes, tensors_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "x.safetensors"


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


def test_metadata_that_is_null_is_none(place: Path) -> None:
    """As MLX writes it; the library's own reader takes it too."""
    from safetensors import safe_open

    opened = TensorFile(file_of(place, {"__metadata__": None, "a": ENTRY}, bytes(8)))
    assert opened.metadata == {} and list(opened) == ["a"]
    with safe_open(place, "np") as theirs:
        assert theirs.metadata() is None and list(theirs.keys()) == ["a"]


@given(tensors_of(), st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
def test_what_is_built_is_parsed_again(tensors: Tensors, metadata: dict[str, str]) -> None:
    specs = canonical({name: spec for name, (spec, _) in tensors.items()})
    header, offsets, end = build_header(specs, metadata)
    entries, found = parse_header(header, end)
    assert len(header) % 8 == 0 and found == metadata
    assert {name: spec for name, (spec, _) in entries.items()} == specs and {name: begin for name, (_, begin) in entries.items()} == offsets
    widths = [BITS[spec.dtype] for spec in specs.values()]
    assert widths == sorted(widths, reverse=True), "wider dtypes first, so that every tensor is aligned"
