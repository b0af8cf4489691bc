"""The base model as the operations on adapters see it: names to resolve against, weights to read, its identity."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.checkpoint import Checkpoint
from loratools.differences import digest
from loratools.errors import MatchError, QuantizedError
from loratools.formats.reading import Reading
from loratools.pipeline import open_checkpoint
from loratools.plan import supplied
from loratools.receipt import checkpoint_input
from loratools.refs import Ref


class Base:
    """A checkpoint or pipeline and what its config tells; a head that is tied and not on disk is there under its name.

    Raises QuantizedError for weights that are quantised, and what opening it raises.
    """

    def __init__(self, path: str | Path, reading: Reading) -> None:
        self.checkpoint = open_checkpoint(path)
        if self.checkpoint.quantization:
            remedy = "give the original 16- or 32-bit weights"
            fact = "the base's weights are quantised"
            raise QuantizedError(fact, file=self.checkpoint.path, found=self.checkpoint.quantization, remedy=remedy)
        self.family = self.checkpoint.family(tuple(reading["embedding"]), tuple(reading["transposed"]))
        self.sources = {name: name for name in self.checkpoint}
        for tied, head in self.family.ties(self.checkpoint):
            self.sources.setdefault(head, tied)
        self.specs = {name: self.checkpoint[source].spec for name, source in self.sources.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.sources

    def weight(self, name: str) -> Ref:
        """The tensor of that name, not read yet."""
        return self.checkpoint[self.sources[name]]

    def resolve(self, adapter: Adapter) -> Adapter:
        """The adapter under the base's names, every delta known to fit."""
        return adapter.resolve(self.specs, self.family).map(lambda name, delta: supplied(name, delta, self.checkpoint))

    def input(self, threads: int) -> dict[str, Any]:
        """Its row among a receipt's inputs: all of it is read, for its identity is its content."""
        digests: dict[str, str] = {}
        workers.run_all([partial(_digest, name, self.checkpoint, digests) for name in self.checkpoint], threads)
        return checkpoint_input(self.checkpoint, "base", digests)


def resolved(adapters: Iterable[Adapter], base: Base | None) -> list[Adapter]:
    """The adapters under the base's names, or as they are where there is none. Raises MatchError where names are of two spellings."""
    adapters = list(adapters)
    if base is None and len({one.numbered is None for one in adapters}) > 1:
        counted = next(one for one in adapters if one.numbered is not None)
        fact = "its file counts modules instead of naming them, as the others' do"
        raise MatchError(fact, file=counted.path, found=next(iter(counted)), remedy="give --base")
    if base is None and len({one.flat for one in adapters}) > 1:
        flat = next(one for one in adapters if one.flat)
        fact = "its names have underscores where the others' have dots, so no tensor of theirs would meet"
        raise MatchError(fact, file=flat.path, found=next(iter(flat)), remedy="give --base")
    return [one if base is None else base.resolve(one) for one in adapters]


def _digest(name: str, checkpoint: Checkpoint, digests: dict[str, str]) -> None:
    digests[name] = digest(checkpoint[name])
