"""Sliced: rows and columns of a stored matrix, the bytes of torch's own indexing, read no further than asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.refs import Buffer, Ref, Spec, origin
from loratools.sliced import Pool, Pooled, Sliced
from loratools.tensorfile import identity
from loratools.tensors import read_tensor, to_ref

WHOLE = slice(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 3), st.integers(1, 3))
def test_it_is_an_index(dtype: torch.dtype, start: int, count: int, first: int, step: int) -> None:
    held = torch.arange(54).reshape(9, 6).to(dtype)
    rows, columns = slice(start, start + count), slice(first, None, step)
    found = Sliced(to_ref(held), rows, columns)
    expected = held.view(torch.uint8 if dtype == torch.float8_e4m3fn else dtype)[rows, columns].view(dtype)
    assert found.spec == Spec(to_ref(held).spec.dtype, tuple(expected.shape))
    assert torch.equal(read_tensor(found).float(), expected.float())
    middle = found.spec.shape[0] // 2
    assert bytes(found.rows(middle, found.spec.shape[0])) == bytes(found.read())[middle * found.spec.row_bytes() :]
    assert torch.equal(read_tensor(found.T).float(), expected.float().T)


def test_a_slice_of_a_slice_knows_what_it_is_of() -> None:
    held = to_ref(torch.arange(54.0).reshape(9, 6))
    inner = Sliced(Sliced(held, slice(2, 8)), slice(1, 3), slice(1, None, 2))
    assert read_tensor(inner).tolist() == [[19, 21, 23], [25, 27, 29]]
    assert origin(inner) is held and identity(inner) == identity(held)


def test_only_its_rows_are_read() -> None:
    class Watched(Ref):
        spec = Spec("F32", (9, 6))

        def rows(self, start: int, stop: int) -> Buffer:
            asked.append((start, stop))
            return bytes((stop - start) * 24)

    asked: list[tuple[int, int]] = []
    Sliced(Watched(), slice(3, 7)).rows(1, 3)
    Sliced(Watched(), slice(3, 7), slice(0, 2)).read()
    assert asked == [(4, 6), (3, 7)]


class Counted(Ref):
    """A tensor that counts how often it is read."""

    def __init__(self, value: int) -> None:
        self.spec, self.value, self.reads = Spec("F32", (4, 6)), value, 0

    def rows(self, start: int, stop: int) -> Buffer:
        self.reads += 1
        return bytes([self.value]) * ((stop - start) * 24)


def test_a_pool_reads_a_tensor_once_while_it_is_among_the_last() -> None:
    pool, tensors = Pool(2), [Counted(value) for value in range(3)]
    one, two, three = (Pooled(tensor, pool) for tensor in tensors)
    for _ in range(3):
        assert bytes(one.rows(1, 2)) == bytes([0]) * 24 and bytes(two.rows(0, 4)) == bytes([1]) * 96
    one.read()
    assert [tensor.reads for tensor in tensors] == [1, 1, 0]
    assert bytes(Sliced(three, slice(1, 3), slice(0, 2)).read()) == bytes([2]) * 16
    one.read()  # was used after the second, which made room for the third
    two.read()
    assert [tensor.reads for tensor in tensors] == [1, 2, 1]
    assert origin(Sliced(one)) is tensors[0] and identity(Sliced(one)) == identity(tensors[0])
