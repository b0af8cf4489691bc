"""MLX-LM: `adapters.safetensors` (or `.npz`) beside an `adapter_config.json` that has no `peft_type`; factors transposed.

    MODULE.lora_a (in, r)   MODULE.lora_b (r, out)    ΔW = scale · (lora_a·lora_b)ᵀ     MODULE.m (out)    DoRA, one norm a row
    a stack's  lora_a (experts, r, in)  lora_b (experts, out, r)   ΔW[e] = scale · lora_b[e]·lora_a[e]

`scale` is used as it is, without a division by the rank; from 2024-01 to 2024-06 it was scale·alpha/r. Read from mlx-lm's
`mlx_lm/tuner/lora.py`, `dora.py`, `utils.py` and their history; spec/formats/mlx.md tells the eras.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Stacked
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, NotExpressible, ShapeError, UnsupportedError, raise_all
from loratools.families import EMBEDDINGS, Family, matches
from loratools.formats._mixed import mixed
from loratools.formats._refused import BAKE, RESIZE, passengers
from loratools.formats._scalar import finite
from loratools.formats._scale import exact_alpha, only
from loratools.formats._stack import Member
from loratools.formats.base import Container, ReadOptions
from loratools.formats.mlx_experts import count_of, factors, stacks
from loratools.formats.mlx_tied import both, spoken
from loratools.refs import Ref

NAME = "mlx"
_KEY = re.compile(r"(?P<module>.+)\.(?P<slot>lora_a|lora_b|m)")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_MARKS = ("fine_tune_type", "lora_parameters", "lora_layers", "num_layers")


def detect(container: Container) -> bool:
    """Whether a config of MLX's lies beside it, or, where there is none, its factors are named and turned as MLX's."""
    if container.config is not None:
        return "peft_type" not in container.config and any(mark in container.config for mark in _MARKS)
    if container.fields:  # GGUF's, whose factors are named alike
        return False
    return any(key.endswith(".lora_a") for key in container.tensors) and not any(".weight" in key for key in container.tensors)


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter MLX saved, under its model's names.

    Raises AmbiguousError where neither the config nor `scale`/`alpha` of the options tell the scale, FormatError for strays.
    """
    options = options or ReadOptions()
    config = container.config or {}
    try:
        kind = config.get("fine_tune_type")
        if kind not in (None, "lora", "dora", "full"):
            raise UnsupportedError("adapter_config.json: fine_tune_type", found=str(kind)[:60], expected="lora, dora or full")
        if kind == "full":
            deltas: dict[str, Delta] = {name: Replacement(value=ref) for name, ref in container.tensors.items()}
        else:
            deltas = _deltas(container.tensors, config, options)
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    metadata = {NAME: {name: config[name] for name in ("model", "num_layers", "fine_tune_type") if name in config}}
    adapter = Adapter(deltas, metadata, {}, container.path, NAME, container.files)
    return replace(adapter, pending=partial(_pending, adapter))


def _pending(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The adapter for a base with this config: what MLX changes of an embedding also on a head tied to it."""
    whole = adapter.metadata[NAME].get("fine_tune_type") == "full"
    family = Family({}) if whole else Family(dict(config))
    return replace(adapter, numbered=lambda deltas, base: both(deltas, base, family))


def _deltas(tensors: Mapping[str, Ref], config: Mapping[str, Any], options: ReadOptions) -> dict[str, Delta]:
    modules: dict[str, dict[str, Ref]] = {}
    faults: list[LoratoolsError] = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            faults.append(FormatError("not a key MLX writes beside LoRA", tensor=key, expected="lora_a, lora_b or m"))
        else:
            modules.setdefault(match["module"], {})[match["slot"]] = ref
    scale = _scale(config, options)
    deltas = {}
    for module, parts in modules.items():
        try:
            deltas[f"{module}.weight"] = _delta(f"{module}.weight", parts, config, options, scale)
        except LoratoolsError as error:
            faults.append(error.at(tensor=f"{module}.{next(iter(parts))}"))
    raise_all(faults)
    return deltas


def _scale(config: Mapping[str, Any], options: ReadOptions) -> tuple[float, bool]:
    """The config's scale, and whether it is still to be multiplied by alpha/r, as in the first half of 2024."""
    stated = _parameters(config)
    if options.alpha is not None:  # the scale itself, where there is no config: npz files keep none
        return options.alpha, options.scale == "alpha/r"
    scale = stated.get("scale")
    if scale is None:
        raise AmbiguousError("no scale in the file: MLX keeps it in adapter_config.json", remedy="give the scale with --alpha-in S")
    if not isinstance(scale, int | float) or not finite(scale):
        raise FormatError("adapter_config.json: lora_parameters.scale", found=scale, expected="a number")
    recent = "fine_tune_type" in config or "num_layers" in config
    if options.scale is None and not recent and "alpha" in stated:
        raise AmbiguousError(
            "an alpha beside the scale: until June 2024 MLX multiplied by scale·alpha/r, since then by scale alone",
            found=f"scale {scale:g}, alpha {stated['alpha']}", remedy="give --scale alpha for scale alone, --scale alpha/r for the former",
        )  # fmt: skip
    return float(scale), options.scale == "alpha/r"


def _delta(name: str, parts: Mapping[str, Ref], config: Mapping[str, Any], options: ReadOptions, scale: tuple[float, bool]) -> Delta:
    for slot in ("lora_a", "lora_b"):
        if slot not in parts:
            raise FormatError(f"has no {slot} beside it", remedy="the file is incomplete")
    a, b = parts["lora_a"], parts["lora_b"]
    left, right = a.spec.shape, b.spec.shape
    if len(left) == len(right) == 3 and left[:2] == (right[0], right[2]):
        made = [_low(Member(a, i), Member(b, i), _factor(scale, config, left[1]), "linear") for i in range(left[0])]
        if "m" in parts:
            raise FormatError("a magnitude beside a stack of experts")
        return Stacked(members=tuple(made))
    if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
        raise ShapeError("lora_a and lora_b do not meet", found=f"{list(left)}, {list(right)}", expected="[in, r], [r, out]")
    factor = _factor(scale, config, left[1])
    if matches(name, options.embeddings) or matches(name, EMBEDDINGS):
        low = _low(b, a, factor, "embedding")
    elif matches(name, options.transposed) and "m" not in parts:
        low = _low(b, a, factor, "transposed")
    else:
        low = _low(a.T, b.T, factor, "unknown")  # MLX has (out, in) everywhere; a base of GPT-2 has not
    if config.get("fine_tune_type") == "dora" and "m" not in parts:
        raise FormatError("fine_tune_type is dora, and the module has no m")
    if "m" not in parts:
        return low
    if parts["m"].spec.shape != (low.shape()[0],):
        raise ShapeError("the magnitude does not fit its factors", found=list(parts["m"].spec.shape), expected=[low.shape()[0]])
    return DoRA(direction=low, magnitude=parts["m"].reshape(low.shape()[0], 1))


def _factor(scale: tuple[float, bool], config: Mapping[str, Any], rank: int) -> float:
    value, old = scale
    stated = _parameters(config)
    if stated.get("rank") is not None and stated["rank"] != rank:
        raise ShapeError("the rank is not the config's", found=rank, expected=stated["rank"])
    if not old:
        return value
    if not finite(stated.get("alpha")):
        raise FormatError("adapter_config.json has no lora_parameters.alpha to multiply by")
    return float(value * stated["alpha"] / rank)


def _parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    stated = config.get("lora_parameters") or {}
    if not isinstance(stated, Mapping):
        raise FormatError("adapter_config.json: lora_parameters", found=str(stated)[:60], expected="an object")
    return stated


def _low(A: Ref, B: Ref, scaling: float, layer: str) -> LowRank:
    return LowRank(A=A, B=B, alpha=exact_alpha(scaling, A.spec.shape[0]), layer=layer)


# -- writing


def encode(adapter: Adapter) -> Container:
    """The adapter as MLX loads it: one rank and one scale for all, which its config holds.

    Raises NotExpressible for differing ranks or scales (`resize --rank`, `rescale --bake` make them one) and for kinds it lacks.
    """
    faults = passengers(adapter, "MLX has")
    tensors: dict[str, Ref] = {}
    scales: dict[str, float] = {}
    ranks: dict[str, float] = {}
    deltas = stacks(spoken(adapter), Family(dict(adapter.model)).types, count_of(adapter.model))
    for name, delta in deltas.items():
        module = name.removesuffix(".weight")
        if isinstance(delta, Stacked):
            try:
                tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"], one = factors(delta)
                scales[name], ranks[name] = one.scaling, float(one.rank)
            except LoratoolsError as error:
                faults.append(error.at(tensor=name))
            continue
        low = delta.direction if isinstance(delta, DoRA) else delta
        matrix = isinstance(low, LowRank) and len(low.A.spec.shape) == 2
        if not isinstance(low, LowRank) or not matrix or not name.endswith(".weight") or adapter.flat:
            lies = f" ({low.layer})" if isinstance(low, LowRank) else ""
            remedy = "--format loratools keeps it" if lies else "convert it first: --kind lora; --format loratools keeps it"
            if delta.kind in ("experts", "parameter"):
                remedy = "give convert --base BASE, with the config.json of a model whose experts MLX stacks; --format loratools keeps it"
            faults.append(NotExpressible(f"MLX cannot say {delta.called} delta{lies}", tensor=name, remedy=remedy))
            continue
        if _EXPERT.search(name):
            fact = "MLX keeps experts in one stack, and where those of this model are is not known"
            faults.append(NotExpressible(fact, tensor=name, remedy="give convert --base BASE, with its config.json"))
        if low.layer == "transposed":  # MLX's own model has that weight as (out, in)
            low = low.transposed()
        pair = (low.B, low.A) if low.layer == "embedding" else (low.A.T, low.B.T)
        tensors |= {f"{module}.lora_a": pair[0], f"{module}.lora_b": pair[1]}
        scales[name], ranks[name] = low.scaling, float(low.rank)
        if isinstance(delta, DoRA):
            if delta.axis != "out":
                faults.append(NotExpressible("MLX has DoRA along rows only", tensor=name, remedy="convert --magnitude-axis out --base"))
            tensors[f"{module}.m"] = delta.magnitude.reshape(delta.magnitude.spec.numel)
    doras = [name for name, delta in deltas.items() if isinstance(delta, DoRA)]
    faults += mixed(doras, [name for name in deltas if name not in doras], "MLX's fine_tune_type holds for the whole adapter")
    raise_all(faults)
    rank = int(only(ranks, "MLX has one rank for all modules", RESIZE))
    scale = only(scales, "MLX has one scale for all modules", BAKE)
    carried = dict(adapter.metadata.get(NAME, {}))
    keys = sorted({re.sub(r"^.*?\.\d+\.", "", name.removesuffix(".weight")) for name in deltas})
    config = {
        "model": adapter.metadata.get("peft", {}).get("base_model_name_or_path"), "num_layers": -1, **carried,
        "fine_tune_type": "dora" if doras else "lora",
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }  # fmt: skip
    return Container(tensors, config=config, name="adapters.safetensors")
