"""A `.nemo` file: a tar of `model_config.yaml` and `model_weights.ckpt`, read where they lie; nothing is unpacked to disk."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from loratools.errors import FormatError, UnsupportedError
from loratools.formats._sides import parse_yaml
from loratools.refs import Ref
from loratools.source.handles import check_on_disk
from loratools.torchfile import TorchFile

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
LIMIT = 2**32  # bytes a member of a compressed archive may unpack to in memory
_TEXT = 2**24
_REMEDY = f"unpack it, and give {WEIGHTS} beside {CONFIG}"


def read_archive(path: Path) -> tuple[dict[str, Ref], dict[str, Any]]:
    """(tensors by name, the tables beside them by their files' names) of an archive.

    Raises FormatError for what is no such archive, UnsupportedError for weights in shards and for members too large to unpack.
    """
    check_on_disk(path)
    try:
        if not path.is_file():  # a pipe would wait for its writer
            raise FileNotFoundError
        with _tar(path) as archive:
            members = _members(path, archive)
            if WEIGHTS not in members:
                refuse_ranks(path, members)
                raise FormatError(f"no {WEIGHTS} in it", file=path, found=", ".join(list(members)[:4]) or "an empty archive")
            tables = {CONFIG: _table(path, archive, members[CONFIG])} if CONFIG in members else {}
            return dict(TorchFile(path, stream=_stream(path, archive, members[WEIGHTS]))), tables
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise FormatError(f"not a tar archive, or a truncated one ({type(error).__name__})", file=path) from None


def refuse_ranks(path: Path, names: Iterable[str]) -> None:
    """Raises UnsupportedError where a file's members, or a folder's, are one rank's shard each, or a distributed checkpoint."""
    listed = list(names)
    if any(name.endswith("/" + WEIGHTS) for name in listed):
        fact = "weights of several ranks, each of which has rows or columns of its own"
        raise UnsupportedError(fact, file=path, found=", ".join(listed[:3]), remedy="NeMo's lora_converters/to_tp1.py makes one of them")
    if any(name.endswith(".distcp") or name.startswith("model_weights/") for name in listed):
        remedy = "AutoBridge.export_adapter_ckpt of Megatron-Bridge makes peft's of it"
        raise UnsupportedError("a distributed checkpoint of Megatron's", file=path, found=", ".join(listed[:3]), remedy=remedy)


def _tar(path: Path) -> tarfile.TarFile:
    return tarfile.open(path, "r:gz" if _is_packed(path) else "r:")


def _is_packed(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _members(path: Path, archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        if member.isfile():
            name = member.name.removeprefix("./")
            if name in found:
                raise FormatError("a member that is there twice", file=path, found=name)
            found[name] = member
    return found


def _table(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    if member.size > _TEXT:
        raise FormatError(f"{CONFIG} is no config", file=path, found=f"{member.size} bytes", expected=f"at most {_TEXT}")
    try:
        return parse_yaml(_raw(archive, member).read().decode())
    except UnicodeDecodeError:
        raise FormatError(f"{CONFIG} cannot be read (UnicodeDecodeError)", file=path) from None


def _stream(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """The weights to read from: the archive itself, or, as torch goes to and fro in them, a copy of what was compressed."""
    if not _is_packed(path):
        return _raw(archive, member)
    if member.size > LIMIT:
        raise UnsupportedError("a compressed archive too large to read in memory", file=path, found=f"{member.size} bytes", remedy=_REMEDY)
    return BytesIO(_raw(archive, member).read())


def _raw(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    assert stream is not None, "a regular file"
    return stream
