"""NeMo and Megatron-Bridge: adapters of Megatron's fused weights, as a `.nemo` archive or a state dict beside its config.

    MODULE.linear_in.weight (r, in)   MODULE.linear_out.weight (out, r)   ΔW = alpha/dim · linear_out·linear_in
    MODULE.weight_magnitude (out)     DoRA, one norm a row

Rows of `linear_qkv` are grouped by heads that share k and v, its q, its k, its v; `linear_fc1` is gate above up. Canonical LoRA has
factors for each. Read from NeMo's `megatron/adapters/parallel_adapters.py`, `parts/peft_config.py`, `lora_converters/` and
Megatron-Bridge's `peft/lora.py`, `canonical_lora.py`, `dora.py`, `models/conversion/peft_bridge.py`; spec/formats/nemo.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import (
    AmbiguousError,
    FormatError,
    LoratoolsError,
    MatchError,
    ShapeError,
    UnsupportedError,
    raise_all,
)
from loratools.formats._heads import rows_of
from loratools.formats._pieces import Piece
from loratools.formats._trainer import Model, Part, Reading, deltas_of, waiting
from loratools.formats.base import Container, ReadOptions
from loratools.formats.nemo_files import CONFIG, OLDER, RUN, Told, told
from loratools.refs import Ref

NAME = "nemo"
_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>linear_in\.weight|linear_out\.weight|weight_magnitude)")
_ROOT = re.compile(r"(?:model\.|module\.)*(?:language_model\.encoder|decoder)\.(layers\.\d+)\.(.+)")


def detect(container: Container) -> bool:
    """Whether it has factors `linear_in.weight` within an `adapter` or an `adapter_layer`."""
    return any(re.search(r"\.adapter(_layer)?\.(.+\.)?linear_in\.weight$", key) for key in container.tensors)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter under the names of transformers; headers only. Without the model's config.json beside it, `pending` on the base's.

    Raises AmbiguousError without an alpha, FormatError for strays, incomplete modules and models whose names are not known, MatchError
    where the base has other heads, UnsupportedError for LoRA of experts, ShapeError.
    """
    return _Reading(container, options or ReadOptions()).now()


class _Reading(Reading):
    def adapter(self, config: Mapping[str, Any]) -> Adapter:
        said, model = told(self.container.beside), Model.of(NAME, config)
        alpha = self._alpha(said)
        if said.heads and model.heads and said.heads != model.heads:
            raise MatchError(f"its heads, in {said.file}, are not the model's", found=said.heads, expected=model.heads)
        model = replace(model, heads=model.heads or said.heads)
        parts, deltas, faults = list[Part](), dict[str, Delta](), list[LoratoolsError]()
        for module, pair in _modules(self.container.tensors).items():
            try:
                piece = _piece(pair, alpha, said)
                if model.family is None:
                    deltas |= [waiting(module, piece, self.unknown())]
                else:
                    parts += _parts(module, piece, model)
            except LoratoolsError as error:
                faults.append(error.at(tensor=f"{module}.{next(iter(pair))}"))
        raise_all(faults)
        deltas |= deltas_of(parts, model.heads)
        files = (*self.container.files, *self.container.used("config.json", CONFIG, RUN))
        return Adapter(deltas, {}, {}, self.container.path, NAME, files, model=model.config)

    def _alpha(self, said: Told) -> float:
        """The one alpha of the config, or of the options."""
        alpha = said.alpha if self.options.alpha is None else self.options.alpha
        if alpha is None:
            fact = f"no alpha in the file: it is in NeMo's {CONFIG}, in Megatron-Bridge's {RUN}"
            raise AmbiguousError(fact, remedy="put that beside it, or give the alpha with --alpha-in A")
        return float(alpha)


def _piece(pair: Mapping[str, Ref], alpha: float, said: Told) -> Piece:
    lacking = [slot for slot in ("linear_in.weight", "linear_out.weight") if slot not in pair]
    if lacking:
        raise FormatError(f"has no {lacking[0]} beside it", remedy="the file is incomplete")
    A, B = pair["linear_in.weight"], pair["linear_out.weight"]
    if len(A.spec.shape) != 2 or not A.spec.numel:
        raise ShapeError("not a factor", found=list(A.spec.shape), expected="[r, in]", remedy="a shard, or of several layers or experts?")
    if said.rank not in (None, A.spec.shape[0]):
        raise ShapeError(f"the rank is not that of {said.file}", found=A.spec.shape[0], expected=said.rank)
    return Piece(A, B, alpha, pair.get("weight_magnitude"))


def _parts(module: str, piece: Piece, model: Model) -> list[Part]:
    assert model.family is not None
    found = model.family.module(_named(module))
    if found is None:
        known = ", ".join(row.module for row in model.family.rows)
        raise FormatError(f"not a module that NeMo has LoRA on in a {model.family.name}", expected=known)
    row, numbers = found
    if len(row.leaves) == 1:
        return [Part(row.leaves[0], numbers, piece)]
    places = [rows_of(row.order, slot, piece.rows, model.heads) for slot in range(len(row.leaves))]
    return [Part(leaf, numbers, piece.part(rows)) for leaf, rows in zip(row.leaves, places, strict=True)]


def _named(module: str) -> str:
    """A module as Megatron-Bridge names it, without what it lies within.

    >>> _named("model.language_model.encoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter")
    'decoder.layers.0.self_attention.linear_qkv.adapter'
    """
    match = _ROOT.fullmatch(module)
    return module if match is None else f"decoder.{match[1]}.{OLDER.get(match[2], match[2])}"


def _modules(tensors: Mapping[str, Ref]) -> dict[str, dict[str, Ref]]:
    modules: dict[str, dict[str, Ref]] = {}
    faults: list[LoratoolsError] = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            expected = "linear_in.weight, linear_out.weight or weight_magnitude"
            faults.append(FormatError("not a tensor NeMo writes in a LoRA", tensor=key, expected=expected))
        elif ".experts." in key:
            faults.append(UnsupportedError("LoRA of experts, which is not read", tensor=key))
        elif re.search(r"\.adapter_layer\.(?:.*\.)?adapter_[12]\.", key):
            faults.append(UnsupportedError("an adapter of layers of its own, which is no change of a weight", tensor=key))
        else:
            modules.setdefault(match["module"], {})[match["slot"]] = ref
    raise_all(faults)
    return modules
