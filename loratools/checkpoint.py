"""A base model on disk: one file of weights, a folder with one, or an index with shards, opened from headers alone.

`Checkpoint` is a lazy mapping of names to `Ref`s; `rewrite` maps it to another checkpoint. What torch pickled is read through a
mapping. Layouts of files: transformers' and diffusers' `save_pretrained`; spec/checkpoint.md.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from loratools.codes import FourBit
from loratools.dequantize import Plain, dequantized, known
from loratools.errors import LoratoolsError, MatchError, QuantizedError, raise_all
from loratools.families import Family
from loratools.jsonfile import read_json
from loratools.needed import of_model
from loratools.quantized import method, scheme
from loratools.refs import Ref, Spec
from loratools.rewrite import Change, Rewritten, rewrite
from loratools.source import local
from loratools.tensorfile import TensorFile, WeightFile
from loratools.torchfile import PICKLES, TorchFile
from loratools.weightfiles import is_index, model_file, weight_map

_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # transformers ties both to shared.weight


class Checkpoint(Mapping[str, Ref]):
    """A base model's tensors by name, not read yet, from a folder, a file or a repository on the Hub, which is downloaded.

    `notes` are what a person should be told of its files; `shared` the sets of names that stand for one tensor in a pickle and
    are written as a tensor each. Raises FormatError for a header, index or pickle that lies, MatchError for a tensor that is not
    where the index says, AmbiguousError for a folder with several models, UnsupportedError for one with weights of other kinds, and what
    `source.local` raises.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = local(path, of_model)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        name = model_file(self.path)
        self.index_name = name if is_index(name) else None
        self.shards = weight_map(self.folder / name) if self.index_name else {}
        self.files = _open_all(self.folder, sorted(set(self.shards.values())) if self.index_name else [name])
        self._check_names()
        self.stored: Mapping[str, Ref] = {}  # what a dequantised checkpoint was made of
        self.notes: list[str] = []
        self.shared: list[tuple[str, ...]] = []
        for name, file in self.files.items():
            if isinstance(file, TorchFile):
                self.files[name] = self._without_ties(file)
        self._refs = {name: ref for file in self.files.values() for name, ref in file.items()}

    def __getitem__(self, name: str) -> Ref:
        return self._refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    @cached_property
    def specs(self) -> dict[str, Spec]:
        return {name: ref.spec for name, ref in self.items()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `config.json` beside the weights, or nothing."""
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def quantization(self) -> str | None:
        """The name of the scheme its weights are quantised in, if any."""
        return None if self.stored else scheme(self.specs, self.config)

    @property
    def computed(self) -> bool:
        """Whether its tensors are not those of its files, but made of them."""
        return bool(self.stored)

    @property
    def dequantizable(self) -> bool:
        """Whether its weights are quantised, and in a way that `dequantized` reads."""
        return bool(self.quantization) and known(self.specs, self.config)

    def dequantized(self, dtype: str | None = None) -> Checkpoint:
        """The checkpoint as plain weights, in `dtype` or the one its quantiser names; itself if it is not quantised.

        Raises QuantizedError for other schemes, FormatError and ShapeError for parts that do not fit together.
        """
        if not self.quantization:
            return self
        try:
            plain = dequantized(self._refs, self.config, dtype)
            self._check_turned(plain)
        except LoratoolsError as error:
            raise error.at(file=self.path) from None
        made = copy.copy(self)
        made.__dict__.pop("specs", None)
        made._refs, made.stored = plain.refs, self._refs
        refs = {name: {key: plain.refs[key] for key in file if key in plain.refs} for name, file in self.files.items()}
        made.files = {name: file.with_tensors(refs[name]) for name, file in self.files.items()}
        codes = Counter(plain.refs[name].spec.dtype for name in plain.computed)
        told = ", ".join(f"{count} weight{'s' if count > 1 else ''} as {code}" for code, count in codes.items())
        made.notes = [*self.notes, f"dequantised ({self.quantization}): {told}"]
        if plain.left_out:
            count, first = len(plain.left_out), plain.left_out[0]
            made.notes.append(f"scales of activations left out, as plain weights have none: {count} of them, such as {first}")
        if self.single and method(self.config):
            made.notes.append("the output is one file; the config.json it is used with must lose its quantization_config")
        return made

    def _check_turned(self, plain: Plain) -> None:
        """bitsandbytes' layers hold what a Conv1D stores (in, out) the other way round: as plain weights they would be wrong."""
        turned = [name for name in plain.computed if isinstance(plain.refs[name], FourBit) and self.family().transposed(name)]
        if turned:
            fact = "turned when it was quantised, and the plain model stores it (in, out): not dequantised"
            raise QuantizedError(fact, tensor=turned[0], remedy="merge into the original 16- or 32-bit weights")

    def family(self, embeddings: tuple[str, ...] = (), transposed: tuple[str, ...] = ()) -> Family:
        """What its config says of its tensors, with the user's globs on top."""
        return Family(self.config, embeddings, transposed)

    @property
    def parts(self) -> Mapping[str, Checkpoint]:
        """The models it is made of, by what their tensors' names begin with: itself, unless it is a pipeline."""
        return {"": self}

    @property
    def unlike(self) -> str | None:
        """What makes its output's files or tensors others than its own, in words, if anything does."""
        if self.stored:
            return "weights that are dequantised"
        pickled = next((name for name in self.files if name.endswith(PICKLES)), None)
        return f"{pickled}, which is written as safetensors" if pickled else None

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def single(self) -> bool:
        """Whether it was opened as one file, so that nothing beside it belongs to it."""
        return self.path.is_file() and self.index_name is None

    def _check_names(self) -> None:
        held = Counter(name for file in self.files.values() for name in file)
        twice = next((name for name, count in held.items() if count > 1), None)
        if twice is not None:
            raise MatchError("a tensor lies in two shards", file=self.path, tensor=twice)
        if self.index_name is None:
            return
        index = self.folder / self.index_name
        where = {name: shard for shard, file in self.files.items() for name in file}
        faults: list[LoratoolsError] = [
            MatchError("not where the index says", file=index, tensor=name, found=where.get(name, "in no shard"), expected=shard)
            for name, shard in self.shards.items()
            if where.get(name) != shard
        ]
        stray = [name for name in where if name not in self.shards]
        faults += [MatchError("the index does not list it", file=self.folder / where[name], tensor=name) for name in stray]
        raise_all(faults)

    def _without_ties(self, file: TorchFile) -> WeightFile:
        """The file's tensors, but those that transformers drops where it writes safetensors: the config ties them to another."""
        if not file.mapped:
            self.notes.append(f"{file.path.name} is of a torch before 1.6: it cannot be mapped, and is read whole")
        if file.beside:
            self.notes.append(f"not weights, left out of {file.path.name}: {', '.join(file.beside)}")
        dropped: dict[str, str] = {}
        for names in file.aliases:
            dropped |= _ties(names, self.family().tied(file))
            kept = tuple(name for name in names if name not in dropped)
            if len(kept) > 1:
                self.shared.append(kept)
                self.notes.append(f"one tensor in {file.path.name}, written as a tensor each: {', '.join(kept)}")
        self.notes += [f"left out, as it is tied to {other}: {name}" for name, other in dropped.items()]
        return file.with_tensors({name: ref for name, ref in file.items() if name not in dropped})

    def rewrite(
        self,
        out: Path,
        change: Mapping[str, Change],
        *,
        added: Mapping[str, Change] | None = None,
        config: Mapping[str, Any] | None = None,
        workers: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Rewritten:
        """Write the checkpoint to `out` with some tensors changed, as `rewrite.rewrite` does."""
        return rewrite(self, out, change, added=added, config=config, workers=workers, progress=progress)


def _ties(names: tuple[str, ...], tied: tuple[str, str] | None) -> dict[str, str]:
    """Of names of one tensor those that the model makes of another one, and which: of its embedding, its head's bias."""
    embedding, head = tied or ("", "")
    pairs = [(head, embedding), (head.removesuffix("weight") + "bias", head.replace("decoder.weight", "bias"))]
    pairs += [(name, other) for name in names for other in names if name.endswith(_SHARED) and other.endswith("shared.weight")]
    return {name: other for name, other in pairs if name != other and name in names and other in names}


def _open_all(folder: Path, names: Iterable[str]) -> dict[str, WeightFile]:
    files, faults = dict[str, WeightFile](), list[LoratoolsError]()
    for name in names:
        try:
            files[name] = (TorchFile if name.endswith(PICKLES) else TensorFile)(folder / name)
        except LoratoolsError as error:
            faults.append(error)
    raise_all(faults)
    return files
