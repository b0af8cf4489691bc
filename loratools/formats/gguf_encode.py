"""An adapter as llama.cpp loads it: plain LoRA on matrices of one known architecture, one alpha for the file.

llama.cpp scales by alpha / r, r being each pair's own rank, and by 1 where alpha is 0 (`llama_adapter_lora_weight::get_scale`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, OptionError, ShapeError, UnsupportedError, raise_all
from loratools.families import Family
from loratools.formats._experts import apart
from loratools.formats._heads import text_config
from loratools.formats._pieces import Waiting
from loratools.formats._refused import passengers
from loratools.formats._scale import exact_alpha, only
from loratools.formats._stack import Stack
from loratools.formats.base import Container
from loratools.formats.gguf import ALPHA, ARCHITECTURE, KIND, NAME, TYPE
from loratools.formats.gguf_names import (
    HEADS,
    SHARED,
    Heads,
    Names,
    architecture,
    architecture_of,
    heads_of,
    stated_heads,
    tied_head,
)
from loratools.formats.gguf_rows import filled, interleaved
from loratools.gguffile import write_gguf
from loratools.refs import Ref

_DTYPES = ("F32", "F16", "BF16")
_CARRIED = ("adapter.lora.task_name", "adapter.lora.prompt_prefix")
_ROUNDED = "{}: GGUF holds alpha in float32: {!r} became {!r}, a scaling off by a share of {:.1e}; rescale --bake would leave none"
_BASE = "give convert --base a model with its config.json"


def encode(adapter: Adapter) -> Container:
    """The adapter for llama.cpp; the architecture is that of the base it met, or of the GGUF file it came from.

    Raises NotExpressible for what llama.cpp has no tensor or no arithmetic for, or would leave out without a word, and for
    architectures that are not known here.
    """
    fields = dict(adapter.metadata.get(NAME, {}))
    writing = _Writing.of(adapter, fields)
    faults = passengers(adapter, "GGUF has")
    pairs: dict[str, _Pair] = {}
    for name, delta in apart(adapter, Family(dict(adapter.model)).types).items():
        try:
            writing.add(pairs, name, _low(delta))
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    faults += [fault for pair in pairs.values() for fault in pair.faults()]
    raise_all(faults)
    alpha, rank = _scale(pairs)
    exact = {name: exact_alpha(low.scaling, rank or low.rank) for pair in pairs.values() for name, low in pair.named.items()}
    rounded = next(((name, one) for name, one in exact.items() if alpha and one != alpha), None)
    notes = () if rounded is None else (_ROUNDED.format(*rounded, alpha, abs(alpha / rounded[1] - 1)),)
    said = {ARCHITECTURE: writing.names.row.name, TYPE: "adapter", KIND: "lora", ALPHA: alpha} | writing.heads_said()
    said |= {key: text for key, text in fields.items() if key not in said and isinstance(text, str) and _carried(key)}
    tensors = {f"{name}.{slot}": ref for name, pair in pairs.items() for slot, ref in pair.factors(rank).items()}
    return Container(tensors, path=adapter.path, fields=said, writer=_write, notes=notes)


def _carried(key: str) -> bool:
    return key in _CARRIED or key.startswith("general.")


def _write(container: Container, path: Path) -> dict[str, str]:
    if path.suffix != ".gguf":
        raise OptionError("a GGUF adapter is one file", found=path.name, expected="OUT with the ending .gguf")
    return write_gguf(path, container.fields, container.tensors)


def _low(delta: Delta) -> LowRank:
    if isinstance(delta, Replacement) or (isinstance(delta, Chain) and isinstance(delta.first, Replacement)):
        remedy = "fit --for llama.cpp splits it off; peft leaves an embedding out with save_pretrained(..., save_embedding_layers=False)"
        raise NotExpressible("a weight saved whole, and GGUF's adapters have LoRA alone", remedy=remedy)
    if isinstance(delta, LowRank) and delta.layer != "conv" and len(delta.A.spec.shape) == 2:
        found = next((ref.spec.dtype for ref in (delta.A, delta.B) if ref.spec.dtype not in _DTYPES), None)
        if found is not None:
            remedy = "resize --rank R --dtype float32 gives it another"
            raise NotExpressible("a dtype that llama.cpp's LoRA has not", found=found, expected=" or ".join(_DTYPES), remedy=remedy)
        return delta.transposed() if delta.layer == "transposed" else delta
    if isinstance(delta, LowRank):
        raise NotExpressible("llama.cpp has LoRA on matrices, and this is a convolution's", remedy="--format peft or loratools has it")
    remedy = "a matrix's becomes one by convert --kind lora --base BASE"
    raise NotExpressible(f"llama.cpp has plain LoRA on matrices, and this is {delta.called} change", remedy=remedy)


@dataclass
class _Pair:
    """The factors of one of llama.cpp's tensors: of a matrix, or of each expert of a stack of `size`."""

    name: str
    members: dict[int, tuple[str, LowRank]]
    size: int | None = None

    @property
    def lows(self) -> list[LowRank]:
        return [low for _, (_, low) in sorted(self.members.items())]

    @property
    def named(self) -> dict[str, LowRank]:
        return dict(self.members.values())

    def faults(self) -> list[LoratoolsError]:
        """Experts that the stack needs and the adapter lacks, and members that do not stack."""
        if self.size is None:
            return []
        lacking = sorted(set(range(self.size)) - set(self.members))
        first = next(iter(self.named))
        if lacking:
            what = f"llama.cpp stacks the LoRA of all {self.size} experts, and the adapter has not one of each"
            found = f"none of expert {', '.join(map(str, lacking[:4]))}"
            return [NotExpressible(what, tensor=first, found=found, remedy="--format peft or loratools has LoRA of some")]
        try:
            self.factors(max(low.rank for low in self.lows))
        except ShapeError as error:
            fact, remedy = "experts whose factors differ do not stack", "resize --rank R --dtype float32 makes them alike"
            return [NotExpressible(fact, tensor=first, found=error.found, expected=error.expected, remedy=remedy)]
        return []

    def factors(self, rank: int | None) -> dict[str, Ref]:
        """lora_a and lora_b, filled up with zeros to a rank if one is given; the members of a stack to that of the largest."""
        rank = max(low.rank for low in self.lows) if rank is None else rank
        if self.name == "token_embd.weight":
            low = self.lows[0]
            return {"lora_a": filled(low.B, rank, 1), "lora_b": filled(low.A, rank, 0).T}
        a, b = ([filled(low.A, rank, 0) for low in self.lows], [filled(low.B, rank, 1) for low in self.lows])
        return {"lora_a": Stack(a) if self.size else a[0], "lora_b": Stack(b) if self.size else b[0]}


@dataclass(frozen=True)
class _Writing:
    """The names of the adapter's architecture, its heads, and the config of the base it met, if any."""

    names: Names
    heads: Heads | None
    config: Mapping[str, Any]

    @classmethod
    def of(cls, adapter: Adapter, fields: Mapping[str, Any]) -> _Writing:
        if adapter.model.get("model_type") is None and ARCHITECTURE not in fields:
            fact = "llama.cpp's names are those of an architecture, which only the base's config.json tells"
            raise NotExpressible(fact, file=adapter.path, tensor=next(iter(adapter), None), remedy=_BASE)
        config = adapter.model if adapter.model.get("model_type") is not None else {}
        try:
            row = architecture_of(config) if config else architecture(str(fields[ARCHITECTURE]))
        except UnsupportedError as error:
            remedy = "--format peft, which convert_lora_to_gguf.py of llama.cpp reads"
            raise NotExpressible(
                error.fact, file=adapter.path, tensor=next(iter(adapter), None), found=error.found, expected=error.expected, remedy=remedy
            ) from None
        return cls(Names(row), heads_of(config) or stated_heads(fields, row.name), config)

    def heads_said(self) -> dict[str, int]:
        name = self.names.row.name
        rotary = self.names.row.rotary and self.heads is not None
        return {HEADS.format(name): self.heads.q, SHARED.format(name): self.heads.k} if rotary and self.heads else {}

    def add(self, pairs: dict[str, _Pair], name: str, low: LowRank) -> None:
        found = self.names.gguf(name)
        if found is None:
            remedy = "fit --for llama.cpp splits it off; --format peft or loratools has it"
            raise NotExpressible(f"not a tensor of {self.names.row.name} that llama.cpp looks up a LoRA for", remedy=remedy)
        target, expert, side = found
        if self.config and target in ("output.weight", "token_embd.weight") and tied_head(self.config):
            fact = "llama.cpp has one tensor for a tied head and its embedding, and would take the LoRA of one for that of both"
            raise NotExpressible(fact, remedy="untie them, or leave it out")
        if side:
            low = replace(low, B=self._rows(low.B, side))
        if expert is None and target in pairs:
            raise NotExpressible("two names of one of llama.cpp's tensors", found=target, remedy="convert --base finds the model's own")
        pair = pairs.setdefault(target, _Pair(target, {}))
        pair.members[expert or 0] = (name, low)
        if expert is not None:
            pair.size = self._experts(max(pair.members) + 1)

    def _experts(self, seen: int) -> int:
        """How many experts a stack has: as many as the config says, or as the GGUF file has that the adapter came from."""
        config = text_config(self.config)
        found = next((config[key] for key in ("num_local_experts", "num_experts") if type(config.get(key)) is int), None)
        if self.config and found is None:
            fact = "an expert's LoRA, and the base's config does not tell how many experts there are"
            raise NotExpressible(fact, remedy=_BASE)
        return seen if found is None else found

    def _rows(self, B: Ref, side: str) -> Ref:
        if isinstance(B, Waiting):
            return B.origin
        if self.heads is None:
            raise NotExpressible("llama.cpp interleaves its rows by the number of heads, which nothing tells", remedy=_BASE)
        return interleaved(B, self.heads.of(side))


def _scale(pairs: Mapping[str, _Pair]) -> tuple[float, int | None]:
    """The one alpha of the file, and the rank that all factors are filled up to where only that makes it one.

    Raises NotExpressible, naming two modules, where neither does.
    """
    lows = {name: low for pair in pairs.values() for name, low in pair.named.items()}
    alphas = {name: _alpha(name, low.scaling, low.rank) for name, low in lows.items()}
    even = all(len({low.rank for low in pair.lows}) == 1 for pair in pairs.values())
    if len(set(alphas.values())) == 1 and even:
        return next(iter(alphas.values())), None
    scales = {name: low.scaling for name, low in lows.items()}
    scale = only(scales, "llama.cpp has one alpha for all modules, each divided by its rank", "rescale --bake makes all scalings 1")
    if scale == 1.0:
        return 0.0, None
    rank = max(low.rank for low in lows.values())
    return _alpha(next(iter(lows)), scale, rank), rank


def _alpha(name: str, scaling: float, rank: int) -> float:
    """The alpha of a scaling as the 32-bit number that the file holds. Raises NotExpressible for those that mean another thing in it."""
    alpha = exact_alpha(scaling, rank)
    try:
        found = float(struct.unpack("<f", struct.pack("<f", alpha))[0])
    except OverflowError:
        found = 0.0
    if found == 0.0 or found in (float("inf"), float("-inf")):
        fact = "an alpha that GGUF cannot say, where 0 stands for a scaling of 1"
        raise NotExpressible(fact, tensor=name, found=f"{alpha:g}", remedy="rescale --bake moves it into the factors")
    return found
