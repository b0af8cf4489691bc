"""What `fit` does about names: a lone model's go under a part of the pipeline, LoRA of zeros goes beside what a runtime joins.

And which of a target's formats can say the names that come out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats import FORMATS, encode
from loratools.formats.base import Container, read_options
from loratools.formats.diffusers import PARTS
from loratools.ops._base import Base
from loratools.tensors import to_ref
from loratools.workflows._checking import Strike, strikes, subject_in
from loratools.workflows._sorts import sort_of
from loratools.workflows.targets import Target

_PIPELINES = ("diffusers", "comfyui", "kohya")
_UNET = re.compile(r"(down_blocks|up_blocks|mid_block)\.")
_LAYERS = re.compile(r"(layers\.\d+|embed_tokens|norm)\.")
_CLIP = re.compile(r"(text_model|encoder)\.")
_CLIP_5 = re.compile(r"^(text_encoder(?:_2)?\.)(?=(encoder\.layers|embeddings|final_layer_norm)\b)")
_CLIP_5_FLAT = re.compile(r"^(lora_te\d?_)(?=(encoder_layers|embeddings|final_layer_norm)[_.])")


def placed(adapter: Adapter, target: Target) -> dict[str, str]:
    """The name that each of an adapter's has for a target: a lone model's under its part of the pipeline, as diffusers calls it.

    CLIP's modules get the text_model before them that transformers 5 leaves out, but for diffusers, which loads them by its names.
    """
    part = _part(adapter, target)
    names = {name: f"{part}.{name}" if part else name for name in adapter}
    if target.format in ("comfyui", "kohya"):
        names = {old: _CLIP_5.sub(r"\1text_model.", _CLIP_5_FLAT.sub(r"\1text_model_", new)) for old, new in names.items()}
    return names


def _part(adapter: Adapter, target: Target) -> str | None:
    """The part of a pipeline that an adapter of a model alone is of; None where its names tell, or where they are none of a pipeline."""
    dotted = target.format in _PIPELINES and not adapter.flat and adapter.numbered is None
    lone = dotted and not any(name.partition(".")[0] in PARTS or "diffusion_model." in name for name in adapter)
    if not lone or not {sort_of(name) for name in adapter} & {"diffusion", "text encoder"} or any(map(_rooted, adapter)):
        return None
    part = "unet" if any(map(_UNET.match, adapter)) else "text_encoder" if all(map(_CLIP.match, adapter)) else "transformer"
    # the authors' names and diffusers' are told apart by their words, under whatever they lie
    return None if part == "transformer" and target.format != "diffusers" else part


def _rooted(name: str) -> bool:
    return name.startswith(("cond_stage_model.", "conditioner.", "text_encoders.", "first_stage_model."))


def zeros(struck: Iterable[Strike], there: Mapping[str, LowRank], base: Base | None) -> dict[str, LowRank]:
    """LoRA of zeros on the modules that rules found lacking beside others, of their rank and dtype; only a base tells the sizes.

    Raises NotExpressible where there is none, and for modules that it lacks.
    """
    made: dict[str, LowRank] = {}
    faults: list[LoratoolsError] = []
    for one in struck:
        for name in one.lacking:
            near = there[one.names[0]]
            if base is None or name not in base:
                fact = one.rule.reason.rstrip(".")
                remedy = "give --base: LoRA of zeros goes beside it then" if base is None else "merge it into the base, and serve that"
                faults.append(NotExpressible(fact, tensor=one.place, found=one.found, remedy=remedy))
            elif name not in made:
                made[name] = _zero(near, base.weight(name).spec.shape)
    raise_all(faults)
    return made


def _zero(near: LowRank, shape: tuple[int, ...]) -> LowRank:
    import torch

    from loratools.tensors import torch_dtype

    A = torch.zeros(near.rank, shape[1], dtype=torch_dtype(near.A.spec.dtype))
    B = torch.zeros(shape[0], near.rank, dtype=torch_dtype(near.B.spec.dtype))
    return LowRank(A=to_ref(A), B=to_ref(B), alpha=near.alpha, rslora=near.rslora, layer="linear")


def in_memory(name: str, target: Target) -> str:
    """A name as a language model has it in memory, whose files may lack its model."""
    return f"model.{name}" if target.format in ("peft", "mlx") and _LAYERS.match(name) else name


def own_names(source: Adapter, resolved: Adapter, beside: Collection[str]) -> dict[str, str]:
    """The adapter's own name by the base's, where each is the other with a prefix more or less; flat names keep the base's dots.

    Those `beside` others of it have the prefix that these have.
    """
    pairs = {name: own for own, name in zip(source, resolved, strict=False)}
    alike = len(source) == len(resolved) and all(one.endswith(other) or other.endswith(one) for one, other in pairs.items())
    if source.flat or not alike:
        return {}
    for name in beside:
        near = next(one for one in pairs if _parent(one) == _parent(name))
        more = len(pairs[near]) - len(near)
        pairs[name] = pairs[near][:more] + name if more > 0 else name[-more:]
    return pairs


def _parent(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def encoded_for(adapter: Adapter, target: Target) -> Container:
    """The adapter in the first of the target's formats that can say it and that it takes whole, else as the first of them can.

    Raises what the last of them does where none can say it.
    """
    made: list[Container] = []
    faults: list[LoratoolsError] = []
    for format in (target.format, *target.otherwise):
        try:
            made.append(encode(adapter, format))
        except LoratoolsError as error:
            faults.append(error)
            continue
        if not target.otherwise or not _lost_of(made[-1], format, target):
            return made[-1]
    if made:
        return made[0]
    raise faults[-1]


def _lost_of(container: Container, format: str, target: Target) -> list[Strike]:
    """What a target would lose of a container that is not written yet."""
    row = next(row for row in FORMATS if row.name == format)
    adapter = replace(row.decode(container, read_options({})), format=format)
    return [one for one in strikes(subject_in(container, adapter, target), target) if one.rule.loses != "note"]
