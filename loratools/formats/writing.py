"""A container written: as a file of its tensors, or a folder with its config; a writer of the format's own goes first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from loratools.errors import LoratoolsError, OptionError
from loratools.follower import Follower
from loratools.formats.base import CONFIG, Container
from loratools.header import canonical
from loratools.refs import Buffer, Ref, Spec
from loratools.tensorwriter import TensorWriter


def write_container(container: Container, folder: Path) -> dict[str, str]:
    """The container as a folder of `adapter_model.safetensors` and `adapter_config.json`; returns each tensor's digest.

    Without a config it may be a single file: where the name ends in `.safetensors`. A container with a `writer` is written by it.
    The last bytes are not synced: `output.whole` does that before they are seen.
    """
    if container.writer is not None:
        return container.writer(container, folder)
    if container.config is None and folder.suffix == ".safetensors":
        return write_tensors(folder, container)
    if folder.suffix == ".safetensors":
        expected = "OUT without the ending .safetensors"
        raise OptionError("this format is a folder of weights and a config", found=folder.name, expected=expected)
    folder.mkdir(exist_ok=True)
    if container.config is not None:
        (folder / CONFIG).write_text(json.dumps(container.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return write_tensors(folder / container.name, container)


def write_tensors(path: Path, container: Container) -> dict[str, str]:
    """The tensors as one safetensors file, in the library's own order, streamed; the header's digests, if any, are put in last."""
    specs: dict[str, Spec] = canonical({name: ref.spec for name, ref in container.tensors.items()})
    writer = TensorWriter(path, specs, container.stated)
    try:
        if container.seal is None:
            _write_all(writer, container.tensors, lambda block: None)
        else:
            taking = container.seal.begun(specs, container.metadata)
            with Follower(taking.data) as follower:
                _write_all(writer, container.tensors, follower.put)
                follower.finish()
            writer.restate({**container.metadata, **taking.found()})
        writer.close(sync=False)
    finally:
        writer.abandon()
    return writer.digests


def _write_all(writer: TensorWriter, tensors: Mapping[str, Ref], seen: Callable[[Buffer], object]) -> None:
    for name in writer.specs:
        writer.write(name, _blocks(name, tensors[name], seen))


def _blocks(name: str, ref: Ref, seen: Callable[[Buffer], object]) -> Iterator[Buffer]:
    try:
        for block in ref.blocks():
            seen(block)
            yield block
    except LoratoolsError as error:
        raise error.at(tensor=name) from None
