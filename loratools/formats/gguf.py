"""GGUF: the LoRA of llama.cpp, one file whose tensors have llama.cpp's names.

    NAME.lora_a (r, in)      NAME.lora_b (out, r)       ΔW = scale · lora_b·lora_a       scale = alpha / r, or 1 where alpha is 0
    token_embd.weight.lora_a (vocab, r)   .lora_b (dim, r)   ΔW = scale · lora_a·lora_bᵀ
    a stack of experts  .lora_a (experts, r, in)   .lora_b (experts, out, r)

ΔW is that of llama.cpp's weight: of some architectures' q and k its rows are interleaved, and the file does not say by how many
heads. Read from llama.cpp's `src/llama-adapter.cpp`, `src/llama-graph.cpp` and `convert_lora_to_gguf.py`; spec/formats/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError, MatchError, ShapeError, UnsupportedError, raise_all
from loratools.formats._heads import text_config
from loratools.formats._scalar import finite
from loratools.formats._stack import Member
from loratools.formats.base import Container, ReadOptions
from loratools.formats.gguf_names import ARCHITECTURES, HEADS, SHARED, Heads, Names, architecture, heads_of, stated_heads
from loratools.formats.gguf_rows import halved, waiting
from loratools.gguffile import Dequantized
from loratools.refs import Ref

NAME = "gguf"
TYPE, KIND, ARCHITECTURE, ALPHA = "general.type", "adapter.type", "general.architecture", "adapter.lora.alpha"
_KNOWN = (KIND, ALPHA, "adapter.lora.task_name", "adapter.lora.prompt_prefix")
_INVOKED = "adapter.alora.invocation_tokens"


def detect(container: Container) -> bool:
    """Whether it is a GGUF file; that it holds a LoRA is `decode`'s to say."""
    return bool(container.fields)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter under the names of transformers, headers only; where interleaved rows wait for a base's config, it is `pending`.

    Raises UnsupportedError for GGUF files that are no LoRA, for activated LoRA and architectures that are not known here,
    FormatError for other tensors, factors without their partner and fields that change what an adapter does, ShapeError.
    """
    try:
        reading = _Reading.of(container, options or ReadOptions())
        return replace(reading.adapter(None), pending=reading.adapter)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None


@dataclass(frozen=True)
class _Reading:
    """A file's tensors in pairs, and what its fields say."""

    container: Container
    names: Names
    alpha: float | None

    @classmethod
    def of(cls, container: Container, options: ReadOptions) -> _Reading:
        fields = container.fields
        if fields.get(TYPE) != "adapter":
            raise UnsupportedError("a GGUF file that is no adapter", found=f"{TYPE} {fields.get(TYPE, 'model')}", expected="adapter")
        if fields.get(KIND) != "lora":
            raise UnsupportedError("a GGUF adapter of a type that is not read", found=f"{KIND} {fields.get(KIND)}", expected="lora")
        if _INVOKED in fields:
            raise UnsupportedError("an activated LoRA, which changes only what comes after its invocation", found=_INVOKED)
        unknown = [key for key in fields if key.startswith("adapter.") and key not in _KNOWN]
        if unknown:
            raise FormatError("a field that may change what the adapter does", found=", ".join(unknown), expected=", ".join(_KNOWN))
        alpha = fields.get(ALPHA, 0.0) if options.alpha is None else options.alpha
        if not finite(alpha):
            raise FormatError(ALPHA, found=alpha, expected="a number")
        return cls(container, Names(architecture(str(fields.get(ARCHITECTURE)))), float(alpha) or None)

    def adapter(self, config: Mapping[str, Any] | None) -> Adapter:
        """The adapter, given the config of its base once there is one."""
        deltas, faults = dict[str, Delta](), list[LoratoolsError]()
        try:
            counts = self._heads(config)
            for name, pair in _pairs(self.container.tensors).items():
                try:
                    deltas |= self._deltas(name, pair, counts, met=config is not None)
                except LoratoolsError as error:
                    faults.append(error.at(tensor=f"{name}.{next(iter(pair))}"))
            raise_all(faults)
        except LoratoolsError as error:
            raise error.at(file=self.container.path) from None
        metadata = {NAME: self._said(counts)}
        return Adapter(deltas, metadata, {}, self.container.path, NAME, self.container.files, notes=self._notes())

    def _said(self, counts: Heads | None) -> dict[str, Any]:
        """The fields that are one value each, and the heads as they are known by now."""
        told = {key: value for key, value in self.container.fields.items() if isinstance(value, str | int | float)}
        name = self.names.row.name
        return told if counts is None else {**told, HEADS.format(name): counts.q, SHARED.format(name): counts.k}

    def _notes(self) -> tuple[str, ...]:
        notes = [] if self.alpha else [f"no {ALPHA}, or 0: llama.cpp takes it for a scaling of 1"]
        stored = {ref.encoding for ref in self.container.tensors.values() if isinstance(ref, Dequantized)}
        notes += [f"some of its tensors are stored as {', '.join(sorted(stored))}, and read as float32"] if stored else []
        return tuple(notes)

    def _heads(self, config: Mapping[str, Any] | None) -> Heads | None:
        """The heads of q and k, by the base or the file, None while neither tells. Raises MatchError for a base of other ones."""
        row = self.names.row
        kind = text_config(config or {}).get("model_type")
        if kind is not None and kind not in row.types and any(kind in other.types for other in ARCHITECTURES):
            raise MatchError("made for another architecture than the base's", found=row.name, expected=str(kind))
        stated = stated_heads(self.container.fields, row.name)
        given = heads_of(config or {})
        if stated and given and stated != given:
            raise MatchError("its heads are not the base's", found=stated, expected=given)
        known = given or stated
        return known if row.rotary else None

    def _deltas(self, name: str, pair: Mapping[str, Ref], counts: Heads | None, *, met: bool) -> dict[str, Delta]:
        place = self.names.place(name)
        for slot in ("lora_a", "lora_b"):
            if slot not in pair:
                raise FormatError(f"has no {slot}", remedy="the file is incomplete")
        a, b = pair["lora_a"], pair["lora_b"]
        if place.stacked:
            _check(len(a.spec.shape) == len(b.spec.shape) == 3 and a.spec.shape[0] == b.spec.shape[0], a, b, "[e, r, in], [e, out, r]")
            return {place.name.format(index): self._low(Member(a, index), Member(b, index)) for index in range(a.spec.shape[0])}
        _check(len(a.spec.shape) == len(b.spec.shape) == 2, a, b, "[r, in], [out, r]")
        if name == "token_embd.weight":
            return {place.name: self._low(b.T, a, "embedding")}
        if place.side:
            if met and counts is None:
                raise MatchError("rows that llama.cpp interleaved by the model's heads, whose number neither file nor base tells")
            b = halved(b, counts.of(place.side)) if counts else waiting(b)
        low = self._low(a, b)
        return {place.name: replace(low.transposed(), layer="transposed") if self._turned(place.name) else low}

    def _turned(self, name: str) -> bool:
        return self.names.row.turned and name.startswith(self.names.row.block)

    def _low(self, A: Ref, B: Ref, layer: str = "linear") -> LowRank:
        return LowRank(A=A, B=B, alpha=self.alpha or float(A.spec.shape[0]), layer=layer)


def _pairs(tensors: Mapping[str, Ref]) -> dict[str, dict[str, Ref]]:
    """The factors by the name of the weight they change. Raises FormatError for all other tensors, together."""
    pairs: dict[str, dict[str, Ref]] = {}
    faults: list[LoratoolsError] = []
    for key, ref in tensors.items():
        name, _, slot = key.rpartition(".")
        if slot in ("lora_a", "lora_b"):
            pairs.setdefault(name, {})[slot] = ref
        elif key.endswith("_norm.weight"):
            faults.append(UnsupportedError("a norm saved whole, which llama.cpp leaves out without a word", tensor=key))
        else:
            faults.append(FormatError("not a tensor of a GGUF LoRA", tensor=key, expected="NAME.lora_a or NAME.lora_b"))
    raise_all(faults)
    return pairs


def _check(holds: bool, a: Ref, b: Ref, expected: str) -> None:
    if not holds:
        raise ShapeError("lora_a and lora_b do not meet", found=f"{list(a.spec.shape)}, {list(b.spec.shape)}", expected=expected)
