"""corrections: any bytes come back from any prediction; bytes that are none are refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.corrections import corrected, corrections, deflated, from_varints, inflated, segments, varints
from loratools.errors import FormatError
from loratools.refs import BITS, InMemory, Spec

DTYPES = ["F8_E4M3", "BF16", "F16", "F32", "F64", "I64", "BOOL"]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, bytes, bytes]:
    """A dtype, a prediction and the truth: equal, near, or any bits at all, nan and both zeros among them."""
    dtype, count = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 60))
    size = BITS[dtype] // 8
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    one = rng.integers(0, 256, count * size, np.uint8)
    other = one.copy()
    wrong = rng.random(count) < draw(st.sampled_from([0, 0.05, 1]))
    other.reshape(count, size)[wrong] = rng.integers(0, 256, (int(wrong.sum()), size), np.uint8)
    return dtype, one.tobytes(), other.tobytes()


@given(pairs(), st.integers(1, 61))
def test_the_truth_comes_back_whatever_the_blocks(found: tuple[str, bytes, bytes], step: int) -> None:
    dtype, predicted, true = found
    size = step * BITS[dtype] // 8
    blocks = [(predicted[start : start + size], true[start : start + size]) for start in range(0, len(true), size)]
    segment = corrections(iter(blocks), dtype)
    assert segment == corrections(iter([(predicted, true)]), dtype)
    assert corrected(predicted, segment, dtype) == true
    assert [bytes(part) for part in segments(segment * 3)] == [segment] * 3


def test_what_is_right_takes_eight_bytes() -> None:
    assert corrections(iter([(bytes(4096), bytes(4096))]), "F32") == bytes(8)


def test_neighbours_take_little() -> None:
    """One number in a hundred, each a unit off: about 7 bits of gap and 1 of sign for each (their entropy is 8.1 and 1)."""
    rng = np.random.default_rng(0)
    predicted = rng.standard_normal(100_000).astype(np.float32).view(np.int32)
    true = predicted + (rng.random(len(predicted)) < 0.01) * rng.choice([-1, 1], len(predicted)).astype(np.int32)
    wrong = int((predicted != true).sum())
    size = len(corrections(iter([(predicted.tobytes(), true.astype(np.int32).tobytes())]), "F32"))
    assert size * 8 < 12 * wrong  # Huffman codes of whole bits, and their tables


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_varints(numbers: list[int]) -> None:
    data = varints(np.array(numbers, np.uint64))
    assert from_varints(data).tolist() == numbers
    assert len(data) == sum(max(1, -(-number.bit_length() // 7)) for number in numbers)


@pytest.mark.parametrize("data", [b"\x80", b"\x01\xff", b"\xff" * 10 + b"\x01"])
def test_bytes_that_are_no_varints(data: bytes) -> None:
    with pytest.raises(FormatError, match="a number"):
        from_varints(data)


def test_segments_that_cannot_be_the_tensors() -> None:
    segment = corrections(iter([(bytes(8), b"\1" * 8)]), "F32")
    for bad in (segment[:-1], segment[:7], segment + b"\0", segment[:8] + bytes(len(segment) - 8)):
        with pytest.raises(FormatError, match="corrections that"):
            corrected(bytes(8), bad, "F32")
    with pytest.raises(FormatError, match="do not fit the tensor"):
        corrected(bytes(4), segment, "F32")
    with pytest.raises(FormatError, match="end early"):
        list(segments(segment[:4]))


def test_a_whole_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.corrections.CHUNK", 1000)
    data = np.random.default_rng(0).integers(0, 4, 4321, np.uint8).tobytes()
    stored = b"".join(deflated(InMemory(Spec("U8", (len(data),)), data)))
    assert len(stored) < len(data) / 2  # two bits a byte, and what deflate adds
    assert b"".join(inflated(InMemory(Spec("U8", (len(stored),)), stored))) == data
    for bad in (stored[:-1], stored[:3], stored[:4] + bytes(len(stored) - 4)):
        with pytest.raises(FormatError, match="a chunk that"):
            list(inflated(InMemory(Spec("U8", (len(bad),)), bad)))


def test_the_bytes_are_those_of_the_specification() -> None:
    """Its example, read by nothing but zlib: p, v, the positions, the differences; one gap of 2, one difference of +2."""
    segment = corrections(iter([(bytes.fromhex("803f 803f 803f"), bytes.fromhex("803f 803f 823f"))]), "BF16")
    p, v = struct.unpack("<II", segment[:8])
    assert (zlib.decompress(segment[8 : 8 + p]), zlib.decompress(segment[8 + p :])) == (b"\x02", b"\x04") and len(segment) == 8 + p + v
