"""A GGUF file's header and tensors: what is written comes back, and every broken file is one sentence naming it."""

from __future__ import annotations

import builtins
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from loratools.errors import FormatError, LoratoolsError, MissingExtra, UnsupportedError
from loratools.gguffile import GGUFFile, is_gguf, write_gguf
from loratools.refs import Buffer, Ref, Spec
from loratools.tensors import read_tensor, to_ref
from tests.strategies import randn

FIELDS: dict[str, Any] = {"general.architecture": "llama", "general.type": "adapter", "a.count": 3, "a.number": 1.5, "a.flag": True}
# a key, a type and a value; a tensor's name, sizes, type and offset: docs/gguf.md of ggml
STRING, ARRAY, UINT32 = 8, 9, 4


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word)) + word.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, *sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_of(
    fields: list[bytes],
    infos: list[bytes],
    data: bytes = b"\0" * 64,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    tensors, keys = counts or (len(infos), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(fields) + b"".join(infos)
    return head + b"\0" * (-len(head) % align) + data


NAMED = field("general.architecture", STRING, text("llama"))
GOOD = file_of([NAMED], [info("a", 4, 2)])


def test_bytes_and_fields_come_back(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    tensors = {f"t.{index}": randn(3, 5, seed=index, dtype=dtype) for index, dtype in enumerate(dtypes)}
    digests = write_gguf(tmp_path / "a.gguf", FIELDS, {name: to_ref(tensor) for name, tensor in tensors.items()})
    found = GGUFFile(tmp_path / "a.gguf")
    assert is_gguf(tmp_path / "a.gguf") and list(found) == list(tensors) == list(digests)
    assert found.fields == FIELDS and type(found.fields["a.count"]) is int
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(found[name]), tensor)
        assert torch.equal(torch.frombuffer(bytearray(found[name].rows(1, 2)), dtype=tensor.dtype), tensor[1])
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


def test_written_by_hand_it_is_read(tmp_path: Path) -> None:
    """The bytes as the specification has them, and an alignment of another size."""
    (tmp_path / "a.gguf").write_bytes(file_of([NAMED], [info("a", 4, 2)], struct.pack("<8f", *range(8))))
    assert read_tensor(GGUFFile(tmp_path / "a.gguf")["a"]).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    aligned = field("general.alignment", UINT32, struct.pack("<I", 128))
    (tmp_path / "b.gguf").write_bytes(file_of([NAMED, aligned], [info("a", 2)], struct.pack("<2f", 5, 6), align=128))
    assert read_tensor(GGUFFile(tmp_path / "b.gguf")["a"]).tolist() == [5, 6]


BROKEN: dict[str, tuple[bytes, str]] = {
    "another magic": (b"GGML" + GOOD[4:], "GGUF magic invalid"),
    "nothing": (b"", "empty"),
    "a magic alone": (b"GGUF", "truncated"),
    "half a field": (GOOD[:40], "truncated"),
    "half a tensor's data": (GOOD[:-48], "truncated"),
    "a version there is not": (file_of([NAMED], [], version=9), "version 9"),
    "an alignment that is no power of two": (
        file_of([field("general.alignment", UINT32, struct.pack("<I", 24))], [info("a", 2)]), "power of two",
    ),
    "an alignment that is a text": (file_of([field("general.alignment", STRING, text("32"))], [info("a", 2)]), "general.alignment"),
    "a tensor twice": (file_of([NAMED], [info("a", 2), info("a", 2)]), "duplicated tensor with name a"),
    "a key twice": (file_of([NAMED, NAMED], [info("a", 2)]), "Duplicate general.architecture"),
    "a type there is not": (file_of([NAMED], [info("a", 2, kind=77)]), "77"),
    "a field's type there is not": (file_of([field("x", 99, b"\0" * 8)], []), "99"),
    "a text that is none": (file_of([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", UINT32, 1)], []), "utf-8"),
    "a tensor behind the end": (file_of([NAMED], [info("a", 2, offset=1 << 40)]), "truncated"),
    "sizes beyond the file": (file_of([NAMED], [info("a", 1 << 40, 1 << 10)]), "truncated"),
    "sizes whose product is beyond 64 bits": (file_of([NAMED], [info("a", 1 << 40, 1 << 40)]), ""),
    "axes beyond the file": (file_of([NAMED], [text("a") + struct.pack("<I", 1 << 31)]), "truncated"),
    "tensors without end": (file_of([NAMED], [info("a", 2)], counts=(1 << 60, 1)), ""),
    "fields without end": (file_of([NAMED], [], counts=(0, 1 << 60)), ""),
    "a text without end": (file_of([text("x") + struct.pack("<IQ", STRING, 1 << 62)], []), "truncated"),
    "a list without end": (file_of([field("x", ARRAY, struct.pack("<IQ", UINT32, 1 << 62))], []), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_and_costs_nothing(tmp_path: Path, case: str) -> None:
    data, said = BROKEN[case]
    (tmp_path / "a.gguf").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="not a GGUF file, or a broken one") as caught:
            GGUFFile(tmp_path / "a.gguf")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "a.gguf" in str(caught.value) and said in str(caught.value), caught.value
    assert peak < 1 << 20  # a file of a few hundred bytes, whatever its counts say


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    for size in range(len(GOOD) - 32):  # of the 64 bytes of data 32 are the tensor's
        (tmp_path / "a.gguf").write_bytes(GOOD[:size])
        with pytest.raises(FormatError, match="not a GGUF file"):
            GGUFFile(tmp_path / "a.gguf")


def test_the_other_byte_order(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + struct.pack(">Q", 1) + b"x" + struct.pack(">II", UINT32, 1)
    (tmp_path / "a.gguf").write_bytes(head + b"\0" * 64)
    with pytest.raises(UnsupportedError, match=r"big-endian GGUF file; convert it with gguf-convert-endian"):
        GGUFFile(tmp_path / "a.gguf")


# -- tensors that are no plain floats


def quantised(path: Path, kind: gguf.GGMLQuantizationType, W: np.ndarray) -> None:
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_tensor("a", gguf.quantize(W, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_quantised_tensors_are_read_as_float32(tmp_path: Path, kind: str) -> None:
    code = gguf.GGMLQuantizationType[kind]
    W = randn(3, 64, seed=0).numpy()
    quantised(tmp_path / "a.gguf", code, W)
    found = GGUFFile(tmp_path / "a.gguf")["a"]
    expected = gguf.dequantize(gguf.quantize(W, code), code)
    assert found.spec == Spec("F32", (3, 64)) and found.encoding == kind
    assert np.array_equal(read_tensor(found).numpy(), expected)
    assert np.array_equal(np.frombuffer(found.rows(1, 3), np.float32).reshape(2, 64), expected[1:])


def test_a_quantisation_that_the_package_does_not_undo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantised(tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q8_0, randn(1, 32, seed=0).numpy())
    found = GGUFFile(tmp_path / "a.gguf")["a"]

    def refuse(*given: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(UnsupportedError, match="a quantisation that the gguf package does not undo: found Q8_0"):
        found.read()


def test_integers(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(file_of([NAMED], [info("a", 2, kind=26)]))  # I32
    with pytest.raises(FormatError, match="a: a tensor of integers: found I32"):
        GGUFFile(tmp_path / "a.gguf")


# -- writing, and the package that is needed


class Short(Ref):
    """A tensor that gives fewer bytes than it says, or none."""

    def __init__(self, make: Callable[[], Iterator[Buffer]]) -> None:
        self.spec, self.make = Spec("F32", (2,)), make

    def rows(self, start: int, stop: int) -> Buffer:
        return b""

    def blocks(self, size: int = 0) -> Iterator[Buffer]:
        return self.make()


def test_a_tensor_that_fails_while_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="a: not as many bytes as its spec has: found 4, expected 8"):
        write_gguf(tmp_path / "a.gguf", FIELDS, {"a": Short(lambda: iter([b"1234"]))})

    def failing() -> Iterator[Buffer]:
        raise LoratoolsError("gone")
        yield b""

    with pytest.raises(LoratoolsError, match="a: gone"):
        write_gguf(tmp_path / "a.gguf", FIELDS, {"a": Short(failing)})


def test_without_the_package_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(GOOD)
    real = builtins.__import__

    def without(name: str, *given: Any, **more: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for use in (lambda: GGUFFile(tmp_path / "a.gguf"), lambda: write_gguf(tmp_path / "b.gguf", FIELDS, {})):
        with pytest.raises(MissingExtra) as caught:
            use()
        assert str(caught.value) == 'GGUF files need the gguf package, which is not installed; pip install "loratools[gguf]"'
    assert is_gguf(tmp_path / "a.gguf") and not is_gguf(tmp_path / "none.gguf")
