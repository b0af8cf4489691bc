"""A GGUF file: its header read and written by the gguf package, its tensors by blocks of rows.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file is `GGUF | version | counts | keys and values |
names, sizes and offsets | data`, each tensor aligned; sizes are in the order of ggml's `ne`, the last axis of the shape first.
Read from gguf-py 0.19 (`gguf_reader.py`, `gguf_writer.py`, `quants.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from loratools.errors import FormatError, LoratoolsError, MissingExtra, UnsupportedError, raise_all
from loratools.refs import Buffer, Ref, Spec
from loratools.source.handles import Handle, check_on_disk
from loratools.tensorfile import InFile, WeightFile

MAGIC = b"GGUF"
_FLOATS = ("F32", "F16", "BF16", "F64")


def package() -> Any:
    """The gguf package. Raises MissingExtra where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("GGUF files need the gguf package, which is not installed", remedy='pip install "loratools[gguf]"') from None
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == MAGIC


class GGUFFile(WeightFile):
    """A GGUF file opened from its header: names to `Ref`s in the order it has them, keys to values in `fields`.

    Quantised tensors are read as float32. Raises FormatError, naming the file, for a header that is broken, a file that is
    truncated, tensors of integers; UnsupportedError for big-endian files; MissingExtra.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_on_disk(self.path)
        reader, self.fields = _read(self.path)
        handle = Handle(self.path)
        refs: dict[str, Ref] = {}
        faults: list[LoratoolsError] = []
        for found in reader.tensors:
            try:
                refs[found.name] = _ref(self.path, handle, found)
            except LoratoolsError as error:
                faults.append(error.at(file=self.path, tensor=found.name))
        raise_all(faults)
        super().__init__(self.path, handle.size, refs)


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The package's reader, made to stop where the file does (as it is, it takes what is missing for nothing), and the fields."""
    import numpy as np

    gguf = package()
    reader_class: Any = gguf.GGUFReader

    class Checked(reader_class):  # type: ignore[misc]
        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("truncated")
            return super()._get(offset, dtype, count, override_order)

    try:
        reader = Checked(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, OSError) as error:
        told = str(error.args[0]) if error.args else type(error).__name__
        raise FormatError("not a GGUF file, or a broken one", file=path, found=told) from None
    if reader.endianess != gguf.GGUFEndian.LITTLE:
        raise UnsupportedError("a big-endian GGUF file", file=path, remedy="convert it with gguf-convert-endian")
    return reader, fields


def _ref(path: Path, handle: Handle, found: Any) -> Ref:
    code, shape = found.tensor_type.name, tuple(int(size) for size in reversed(found.shape.tolist()))
    if code in _FLOATS:
        return InFile(path, handle, int(found.data_offset), Spec(code, shape))
    stored = InFile(path, handle, int(found.data_offset), Spec("U8", (int(found.n_bytes),)))
    if code[0] == "I" and code[1:].isdigit():
        raise FormatError("a tensor of integers", found=code)
    return Dequantized(stored, shape, found.tensor_type)


class Dequantized(Ref):
    """A tensor that is stored in one of ggml's quantisations, as float32."""

    def __init__(self, origin: Ref, shape: tuple[int, ...], kind: Any) -> None:
        self.origin, self.kind, self.encoding = origin, kind, str(kind.name)
        self.spec = Spec("F32", shape)

    def read(self) -> Buffer:
        import numpy as np

        gguf = package()
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        stored = np.frombuffer(self.origin.read(), dtype=np.uint8).reshape(-1, self.spec.shape[-1] // block * size)
        try:
            made = gguf.dequantize(stored, self.kind)
        except (NotImplementedError, ValueError):
            raise UnsupportedError("a quantisation that the gguf package does not undo", found=self.encoding) from None
        return memoryview(np.ascontiguousarray(made, dtype=np.float32).tobytes())

    def rows(self, start: int, stop: int) -> Buffer:
        step = self.spec.row_bytes()
        return memoryview(self.read()).cast("B")[start * step : stop * step]


def write_gguf(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Ref]) -> dict[str, str]:
    """Keys with their values and tensors as one GGUF file, streamed; returns the BLAKE3 of each tensor's bytes.

    Texts are written as strings, whole numbers as uint32, others as float32. `fields` has `general.architecture`.
    """
    gguf = package()
    writer = gguf.GGUFWriter(path, arch=fields["general.architecture"])
    kinds = gguf.GGMLQuantizationType
    for key, value in fields.items():
        if key != "general.architecture":
            {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, float: writer.add_float32}[type(value)](key, value)
    for name, ref in tensors.items():
        writer.add_tensor_info(name, ref.spec.shape, _numpy(ref.spec), ref.spec.nbytes, raw_dtype=kinds[ref.spec.dtype])
    digests = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (stream,) = writer.fout
        writer.write_padding(stream, stream.tell())
        for name, ref in tensors.items():
            digests[name] = _copied(stream, name, ref)
            writer.write_padding(stream, ref.spec.nbytes)
    finally:
        writer.close()
    return digests


def _numpy(spec: Spec) -> Any:
    """A dtype that the writer takes no bytes of a quantisation for."""
    import numpy as np

    return np.dtype(np.float32 if spec.dtype == "F32" else np.float16)


def _copied(stream: Any, name: str, ref: Ref) -> str:
    digest, count = blake3(), 0
    try:
        for block in ref.blocks():
            digest.update(block)
            count += stream.write(block)
    except LoratoolsError as error:
        raise error.at(tensor=name) from None
    if count != ref.spec.nbytes:
        raise FormatError("not as many bytes as its spec has", tensor=name, found=count, expected=ref.spec.nbytes)
    return digest.hexdigest()
