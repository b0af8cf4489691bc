"""peft: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

LoRA is read here, every other method by its row of `peft_methods`. Grammar, scale and formulas were read from peft 0.21.2
(`utils/save_and_load.py`, `tuners/lora/layer.py`, `dora.py`) and are told in spec/formats/peft.md. A LoRA's key is
`base_model.model.` + the module's path + a marker:

    .lora_A.weight (rank, in, *kernel)   .lora_B.weight (out, rank, 1…)   .lora_B.bias (out)
    .lora_embedding_A (rank, vocabulary) .lora_embedding_B (dimension, rank)
    .lora_magnitude_vector (out) or, for a convolution, (1, out, 1…)

with an adapter's name or `.weight` behind a marker in live state dicts; every other key is a whole tensor of the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.errors import FormatError, LoratoolsError, ShapeError, UnsupportedError, raise_all
from loratools.families import matches
from loratools.formats.base import Container, ReadOptions, nearest
from loratools.formats.peft_config import LoraConfig, parse
from loratools.formats.peft_experts import check_packing, idle_parameters, on_parameters, parameter_grammar, parameter_names, wraps
from loratools.formats.peft_keys import Key, Module, Sorted, check_targeted, sort_keys
from loratools.formats.peft_method import Found, read
from loratools.formats.peft_methods import method_of
from loratools.formats.peft_notes import unused
from loratools.formats.peft_targets import Targets
from loratools.tensorfile import Ref, Spec

NAME = "peft"


def detect(container: Container) -> bool:
    """Whether the config beside the tensors says which of peft's methods it is."""
    return container.config is not None and "peft_type" in container.config


def decode(container: Container, options: ReadOptions | None = None) -> Adapter:
    """The adapter a peft folder holds; every tensor of it becomes part of a delta or is named in an error."""
    options = options or ReadOptions()
    kind = str((container.config or {}).get("peft_type")).upper()
    try:
        config, found, deltas, notes = _lora(container, options) if kind == "LORA" else read(container, options, method_of(kind))
        deltas = _with_whole(deltas, found.whole)
        if not deltas:
            raise FormatError("no adapter tensors in it", found=nearest(container.tensors) or "no tensors")
    except LoratoolsError as error:
        raise error.at(file=container.path) from None
    return Adapter(
        deltas=deltas,
        metadata={"peft": dict(config.carried), "safetensors": dict(container.metadata)},
        path=container.path,
        format=NAME,
        files=container.files,
        expects=_expectation(config, deltas, found.modules, some=found.some),
        notes=(*found.notes, *notes),
    )


# -- LoRA

_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<marker>lora_embedding_[AB]|lora_[AB]|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_LEAVES = {"lora_A": ("weight",), "lora_B": ("weight", "bias"), "lora_embedding_A": (None,), "lora_embedding_B": (None,)}


def _lora(container: Container, options: ReadOptions) -> Found:
    config = parse(container.config or {}, alpha=options.alpha)
    found = sort_keys(container, config, parameter_grammar(_key, config))
    deltas = _deltas(found, config, options)
    check_packing(deltas, config, container.config or {})
    adapted = [path for path, module in found.modules.items() if not wraps(module)] + parameter_names(deltas)
    notes = unused(config, container.config or {}, adapted, found.whole)
    return Found(config, found, deltas, (*notes, *idle_parameters(config, deltas)))


def _key(path: str) -> Key | None:
    """What a key of a LoRA says, its prefix taken off."""
    match = _KEY.fullmatch(path)
    if match is None:
        return None
    marker, leaf = match["marker"], match["leaf"]
    if marker == "lora_magnitude_vector" and leaf == "bias":
        raise FormatError("not a key peft writes", expected=marker)
    if marker != "lora_magnitude_vector" and leaf not in _LEAVES[marker]:
        expected = " or ".join(f"{marker}.{name}" if name else marker for name in _LEAVES[marker])
        raise FormatError("not a key peft writes", expected=expected)
    return Key(match["module"], "bias" if leaf == "bias" else marker, match["adapter"])


def _deltas(found: Sorted, config: LoraConfig, options: ReadOptions) -> dict[str, Delta]:
    deltas: dict[str, Delta] = {}
    faults: list[LoratoolsError] = []
    for path, module in found.modules.items():
        try:
            if wraps(module):
                deltas |= on_parameters(path, module, config)
                continue
            check_targeted(path, module, config, nested=f"{path}.weight" in found.whole)
            deltas[f"{path}.weight"] = _delta(path, module, config, options)
            if "bias" in module.refs:
                deltas[f"{path}.bias"] = _bias(path, module, config, saved=found.some or f"{path}.bias" in found.whole)
        except LoratoolsError as error:
            faults.append(error.at(tensor=next(iter(module.keys.values()))))
    raise_all(faults)
    return deltas


def _delta(path: str, module: Module, config: LoraConfig, options: ReadOptions) -> Delta:
    low = _embedding(path, module, config) if any("embedding" in slot for slot in module.refs) else _linear(path, module, config, options)
    _check_rank(low, path, module, config)
    if config.lora_bias and "lora_B" in module.refs and "bias" not in module.refs:
        raise FormatError("lora_bias is set, and the module has no lora_B.bias", tensor=path, remedy="the file is incomplete")
    magnitude = module.refs.get("lora_magnitude_vector")
    if config.dora and magnitude is None:
        raise FormatError("use_dora is set, and the module has no lora_magnitude_vector", tensor=path)
    if magnitude is None:
        return low
    if not config.dora:
        key = module.keys["lora_magnitude_vector"]
        raise FormatError("a DoRA magnitude without use_dora: peft would drop it in silence", tensor=key, remedy="set use_dora to true")
    return DoRA(direction=low, magnitude=_magnitude(magnitude, low, module.keys["lora_magnitude_vector"]))


def _pair(module: Module, a: str, b: str, path: str) -> tuple[Ref, Ref]:
    for mine, other in ((a, b), (b, a)):
        if mine not in module.refs:
            place = module.keys.get(other) or next(iter(module.keys.values()))
            raise FormatError(f"has no {mine} beside it", tensor=place, remedy="the file is incomplete")
    return module.refs[a], module.refs[b]


def _linear(path: str, module: Module, config: LoraConfig, options: ReadOptions) -> LowRank:
    A, B = _pair(module, "lora_A", "lora_B", path)
    a, b = A.spec.shape, B.spec.shape
    if len(a) < 2 or len(b) != len(a) or any(size != 1 for size in b[2:]):
        raise ShapeError(
            "not a LoRA pair",
            tensor=module.keys["lora_A"],
            found=f"A {list(a)}, B {list(b)}",
            expected="A [rank, in, *kernel], B [out, rank, 1…]",
        )
    if a[0] != b[1] and len(a) > 2 and a[0] % b[1] == 0 and b[1] < a[0]:
        raise UnsupportedError(
            "LoRA on a grouped convolution mixes channels that its weight does not",
            tensor=module.keys["lora_B"],
            found=f"A {list(a)}, B {list(b)}",
        )
    layer = "unknown" if len(a) == 2 else "conv"
    low = LowRank(A=A, B=B.reshape(*b[:2]), alpha=config.alpha_of(path), rslora=config.rslora, layer=layer)
    if layer == "unknown" and matches(f"{path}.weight", options.transposed):
        turned = low.transposed()
        return LowRank(A=turned.A, B=turned.B, alpha=low.alpha, rslora=low.rslora, layer="transposed")
    return low


def _embedding(path: str, module: Module, config: LoraConfig) -> LowRank:
    A, B = _pair(module, "lora_embedding_A", "lora_embedding_B", path)
    if "lora_A" in module.refs or "lora_B" in module.refs:
        raise FormatError("a linear and an embedding LoRA on one module", tensor=next(iter(module.keys.values())))
    if len(A.spec.shape) != 2 or len(B.spec.shape) != 2 or A.spec.shape[0] != B.spec.shape[1]:
        raise ShapeError(
            "A and B do not meet",
            found=f"A {list(A.spec.shape)}, B {list(B.spec.shape)}",
            expected="A [rank, vocabulary], B [dimension, rank]",
        )
    return LowRank(A=B.T, B=A.T, alpha=config.alpha_of(path), rslora=config.rslora, layer="embedding")


def _check_rank(low: LowRank, path: str, module: Module, config: LoraConfig) -> None:
    expected = config.rank(path)
    if expected is not None and low.rank != expected:
        key = module.keys.get("lora_A") or module.keys["lora_embedding_A"]
        remedy = "are A and B swapped?" if low.shape()[0] == expected or expected in low.shape() else None
        raise ShapeError("the rank is not the config's", tensor=key, found=low.rank, expected=expected, remedy=remedy)


def _magnitude(magnitude: Ref, low: LowRank, key: str) -> Ref:
    out, *rest = low.shape()
    shape = magnitude.spec.shape
    if low.layer == "embedding":
        expected: tuple[int, ...] = (low.shape()[1],)
        made: tuple[int, ...] = (1, low.shape()[1])
    elif low.layer == "transposed":
        expected, made = (low.shape()[1],), (1, low.shape()[1])
    elif low.layer == "conv":
        expected, made = (1, out) + (1,) * (len(rest) - 1), (out,) + (1,) * len(rest)
    else:
        expected, made = (out,), (out, 1)
    if shape != expected:
        raise ShapeError("the magnitude does not fit its factors", tensor=key, found=list(shape), expected=list(expected))
    return magnitude.reshape(*made)


def _bias(path: str, module: Module, config: LoraConfig, *, saved: bool) -> Delta:
    key = module.keys["bias"]
    if config.bias != "none" and not saved:
        raise FormatError(f"bias is {config.bias!r}, and the bias that this is added to is not in the file", tensor=key)
    if not config.lora_bias:
        raise FormatError(
            "lora_B.bias without lora_bias: peft would drop it in silence", tensor=key, remedy="set lora_bias to true in the config"
        )
    if "lora_B" not in module.refs or module.refs["bias"].spec.shape != module.refs["lora_B"].spec.shape[:1]:
        raise ShapeError("the bias does not fit lora_B", tensor=key, found=list(module.refs["bias"].spec.shape))
    low = _linear(path, module, config, ReadOptions())
    return Full(diff=module.refs["bias"], scale=low.scaling)


def _with_whole(deltas: Mapping[str, Delta], whole: Mapping[str, Replacement]) -> dict[str, Delta]:
    """Deltas and saved tensors together: a change of a saved tensor comes after it."""
    chained = {name: _after(saved, deltas.get(name)) for name, saved in whole.items()}
    return {**deltas, **chained}


def _after(saved: Replacement, then: Delta | None) -> Delta:
    if isinstance(then, WherePresent):  # it is: it was saved
        then = then.delta
    return saved if then is None else Chain(first=saved, then=then)


def _expectation(
    config: Targets, deltas: Mapping[str, Delta], paths: Iterable[str], *, some: bool
) -> Callable[[Mapping[str, Spec]], Iterable[str]]:
    """What the config promises of a base: each tensor of a module it saves, and where it targets several layers alike, all of them.

    A base may hold more than the model that was trained (a head of another task, a vision tower): a target or bias is
    promised where another layer of the file has its like, or the config names the module in full; so is the bias of a module
    with LoRA, where biases are saved, unless the file itself lists which (`some`). Where a bank is drawn as large as all targets need
    it, every target is promised; and every tensor of the modules (`paths`) of a method that replaces them entirely.
    """
    biases = "none" if some else config.bias
    kin, adapted = {_unnumbered(name) for name in deltas}, {_unnumbered(path) for path in paths}
    modules = {name.rpartition(".")[0] for name in kin}
    every = config.target != "all-linear" and any(delta.draws for delta in deltas.values())

    def alike(name: str, known: set[str] = kin) -> bool:
        shape = _unnumbered(name)
        return shape in known or any(shape.endswith("." + other) or other.endswith("." + shape) for other in known)

    def replaced(module: str) -> bool:
        parts = module.split(".")
        owners = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(config.names(owner) or (config.targets(owner) and alike(owner, adapted)) for owner in owners)

    def expected(base: Mapping[str, Spec]) -> Iterator[str]:
        for name, spec in base.items():
            module, _, leaf = name.rpartition(".")
            owed = leaf == config.tensor and spec.floating and (leaf == "bias" or len(spec.shape) > 1)
            if (
                config.saves(module)
                or (config.tensor == "*" and replaced(module))
                or (owed and config.names(module))
                or (owed and config.target is not None and config.targets(module) and (every or alike(name)))
                or (config.parameter(name) and spec.floating and len(spec.shape) in (2, 3) and _unnumbered(module) in modules)
                or (leaf == "bias" and biases == "all" and alike(name))
                or (leaf == "bias" and biases != "none" and config.targets(module) and alike(f"{module}.weight"))
            ):
                yield name

    return expected


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "#", name)
