"""Where a prediction is not what it should be: positions as gaps, values as differences of ordered integers, deflated.

The numbers of a segment that differ are listed twice over: how many right ones lie before each since the one before it, and how
far the true number is from the predicted one (`loratools.ulps`). Both are varints, seven bits a byte, lowest first, the high bit
of a byte meaning that more follow; differences are zigzag: 0, −1, 1, −2, … as 0, 1, 2, 3, …. spec/unmerge.md defines the bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from loratools.errors import FormatError
from loratools.refs import BITS, Buffer, Ref
from loratools.ulps import from_ordered, ordered

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LENGTHS = struct.Struct("<II")
_LENGTH = struct.Struct("<I")
LEVEL, WHOLE_LEVEL = 6, 1  # of zlib: what is stored whole is mostly noise, which no effort makes smaller
CHUNK = 1 << 22  # bytes of a tensor that are deflated together when it is stored whole
_MOST = 10  # bytes of a varint of 64 bits
_EMPTY = _LENGTHS.pack(0, 0)


def corrections(blocks: Iterator[tuple[Buffer, Buffer]], dtype: str) -> bytes:
    """One segment's: `blocks` are pairs of what is predicted and what is true, in order.

    >>> one, other = bytes.fromhex("803f 803f 803f"), bytes.fromhex("803f 803f 823f")
    >>> both = corrections(iter([(one, other)]), "BF16")
    >>> corrected(one, both, "BF16") == other
    True
    """
    positions, values, start = [], [], 0
    for predicted, true in blocks:
        one, other = (np.frombuffer(data, _unsigned(dtype)) for data in (predicted, true))
        (at,) = np.nonzero(one != other)
        if len(at):
            positions.append(at + start)
            values.append(_differences(one[at], other[at], dtype))
        start += len(other)
    if not positions:
        return _EMPTY
    gaps = np.diff(np.concatenate(positions), prepend=-1) - 1
    streams = [zlib.compress(varints(numbers.astype(np.uint64)), LEVEL) for numbers in (gaps, np.concatenate(values))]
    return _LENGTHS.pack(*map(len, streams)) + b"".join(streams)


def corrected(predicted: Buffer, segment: Buffer, dtype: str) -> bytes:
    """The true bytes of a segment from the predicted ones. Raises FormatError for corrections that cannot be theirs."""
    found = np.frombuffer(bytearray(predicted), _unsigned(dtype))
    gaps, values = _read(memoryview(segment))
    # each gap is below 2**32 and they are fewer than the numbers of a segment: no sum overflows
    if len(gaps) != len(values) or len(gaps) > len(found) or (len(gaps) and int(gaps.max()) >= len(found)):
        raise FormatError("corrections that do not fit the tensor")
    at = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if len(at) and at[-1] >= len(found):
        raise FormatError("corrections that do not fit the tensor")
    zigzag = (values >> np.uint64(1)).view(np.int64) ^ -(values & np.uint64(1)).view(np.int64)
    true = ordered(found[at].tobytes(), dtype) + torch.from_numpy(zigzag)
    found[at] = np.frombuffer(from_ordered(true, dtype), _unsigned(dtype))
    return found.tobytes()


def segments(data: Buffer) -> Iterator[memoryview]:
    """The segments of a tensor's corrections, which follow each other."""
    view = memoryview(data)
    while view:
        if len(view) < _LENGTHS.size:
            raise FormatError("corrections that end early")
        length = _LENGTHS.size + sum(_LENGTHS.unpack(view[: _LENGTHS.size]))
        yield view[:length]
        view = view[length:]


def deflated(ref: Ref) -> Iterator[bytes]:
    """A whole tensor, in chunks: the length of each as 32 bits, then its bytes."""
    for block in ref.blocks(CHUNK):
        data = zlib.compress(block, WHOLE_LEVEL)
        yield _LENGTH.pack(len(data)) + data


def inflated(ref: Ref) -> Iterator[bytes]:
    """The bytes of a tensor that was stored whole, in chunks. Raises FormatError for what cannot be inflated."""
    start, end = 0, ref.spec.nbytes
    while start < end:
        head = bytes(ref.rows(start, min(start + _LENGTH.size, end)))
        stop = start + _LENGTH.size + (_LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else end)
        if stop > end:
            raise FormatError("a chunk that ends early")
        try:
            yield zlib.decompress(ref.rows(start + _LENGTH.size, stop))
        except zlib.error as error:
            raise FormatError(f"a chunk that cannot be inflated: {error}") from None
        start = stop


def varints(numbers: NDArray[np.uint64]) -> bytes:
    """Seven bits a byte, lowest first; the high bit says that more follow.

    >>> varints(np.array([1, 300], np.uint64)).hex()
    '01ac02'
    """
    lengths = np.ones(len(numbers), np.int64)
    for bits in range(7, 64, 7):
        lengths += numbers >= np.uint64(1 << bits)
    starts = np.cumsum(lengths) - lengths
    out = np.zeros(int(lengths.sum()), np.uint8)
    for index in range(int(lengths.max(initial=0))):
        has = lengths > index
        low = (numbers[has] >> np.uint64(7 * index)) & np.uint64(0x7F)
        more = lengths[has] > index + 1
        out[starts[has] + index] = low.astype(np.uint8) | (more.astype(np.uint8) << 7)
    return out.tobytes()


def from_varints(data: Buffer) -> NDArray[np.uint64]:
    """The numbers of `varints`. Raises FormatError for bytes that are none.

    >>> from_varints(bytes.fromhex("01ac02")).tolist()
    [1, 300]
    """
    found = np.frombuffer(data, np.uint8)
    (ends,) = np.nonzero(found < 0x80)
    if not len(found):
        return np.empty(0, np.uint64)
    if not len(ends) or ends[-1] != len(found) - 1:
        raise FormatError("a number that ends early")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if int(lengths.max()) > _MOST:
        raise FormatError("a number of more than 64 bits")
    shifts = 7 * (np.arange(len(found)) - np.repeat(starts, lengths))
    parts = (found & np.uint8(0x7F)).astype(np.uint64) << shifts.astype(np.uint64)
    numbers: NDArray[np.uint64] = np.bitwise_or.reduceat(parts, starts)
    return numbers


def _differences(predicted: NDArray[np.unsignedinteger], true: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.uint64]:
    """true − predicted, modulo 2**64, in zigzag."""
    apart = (ordered(true.tobytes(), dtype) - ordered(predicted.tobytes(), dtype)).numpy()
    return ((apart << 1) ^ (apart >> 63)).view(np.uint64)


def _read(segment: memoryview) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    if len(segment) < _LENGTHS.size or len(segment) != _LENGTHS.size + sum(_LENGTHS.unpack(segment[: _LENGTHS.size])):
        raise FormatError("corrections that end early")
    if segment == _EMPTY:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    middle = _LENGTHS.size + _LENGTHS.unpack(segment[: _LENGTHS.size])[0]
    try:
        gaps, values = (from_varints(zlib.decompress(part)) for part in (segment[_LENGTHS.size : middle], segment[middle:]))
    except zlib.error as error:
        raise FormatError(f"corrections that cannot be inflated: {error}") from None
    return gaps, values


def _unsigned(dtype: str) -> str:
    return f"<u{BITS[dtype] // 8}"
