"""refs: rows, blocks and other shapes of a tensor are parts of its bytes, wherever they lie."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import FormatError
from loratools.refs import BITS, InMemory, Ref, Reshaped, Spec
from loratools.tensorfile import TensorFile
from tests.library import specs, write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refs") / "x.safetensors"


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
