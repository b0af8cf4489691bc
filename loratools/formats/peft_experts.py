"""peft's LoRA on bare parameters (`target_parameters`): fused experts, routers, anything that is no layer's weight.

Read from peft 0.21.2 (`tuners/tuners_utils.py::_inject_parameters`, `tuners/lora/layer.py::ParamWrapper`). The keys name the module:

    M.lora_A.weight (experts·rank, in)   M.lora_B.weight (out, rank·experts)     the outermost wrapper, of the last parameter
    M.base_layer.lora_A.weight …                                                 the one within, of the parameter before

Which parameter of M it is, how many experts and which axis is `in`, the base tells (`deltas.parameters`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.experts import PACKINGS
from loratools.deltas.parameters import Choice, OnParameter
from loratools.deltas.registered import in_registered_order
from loratools.errors import AmbiguousError, FormatError, ShapeError
from loratools.formats.peft_config import LoraConfig
from loratools.formats.peft_keys import Grammar, Key, Module
from loratools.formats.peft_targets import selected
from loratools.formats.peft_values import given

_INNER = ".base_layer"


def parameter_grammar(grammar: Grammar, config: LoraConfig) -> Grammar:
    """The reading of a key where modules may be wrapped several times: the slot of one begins with its depth, 0 outermost."""
    if not config.parameters:
        return grammar

    def read(path: str) -> Key | None:
        key = grammar(path)
        if key is None:
            return None
        module, depth = key.module, 0
        while module.endswith(_INNER):
            module, depth = module.removesuffix(_INNER), depth + 1
        if not _candidates(config, module) or not (depth or _wrapped(config, module)):
            return key
        if key.slot not in ("lora_A", "lora_B"):
            raise FormatError("no tensor of LoRA on a parameter", expected="lora_A or lora_B")
        return Key(module, f"{depth}:{key.slot}", key.adapter)

    return read


def _candidates(config: LoraConfig, module: str) -> list[str]:
    """The parameters of a module that `target_parameters` names; an entry without a path may be any module's."""
    leaves = dict.fromkeys(entry.rpartition(".")[2] for entry in config.parameters)
    return in_registered_order(name for leaf in leaves if config.parameter(name := f"{module}.{leaf}"))


def _wrapped(config: LoraConfig, module: str) -> bool:
    """Whether no list or pattern of `target_modules` has the module, so that LoRA on it can only be on a parameter."""
    named = config.target not in (None, "all-linear") and selected(config.target, module)
    return not named


def wraps(module: Module) -> bool:
    """Whether a module's tensors were read as those of its wrapped parameters."""
    return any(":" in slot for slot in module.refs)


def on_parameters(path: str, module: Module, config: LoraConfig) -> dict[str, Delta]:
    """The wrappers of one module, each under the name of the parameter that it is most likely about."""
    plain = next((key for slot, key in module.keys.items() if ":" not in slot), None)
    if plain is not None:
        raise FormatError("LoRA on a module and on its parameters: peft does not allow both", tensor=plain)
    depths = sorted({int(slot.partition(":")[0]) for slot in module.refs})
    if depths != list(range(len(depths))):
        lacking = next(depth for depth in range(len(depths) + 1) if depth not in depths)
        key = f"{path}{_INNER * lacking}.lora_A"
        raise FormatError("wraps other adapters of its module, and is not there", tensor=key, remedy="the file is incomplete")
    candidates = _candidates(config, path)
    if len(candidates) < len(depths):
        raise FormatError(
            f"{len(depths)} adapters on the parameters of one module", tensor=next(iter(module.keys.values())),
            expected=f"at most {len(candidates)}: {', '.join(candidates)}", remedy="list each in target_parameters",
        )  # fmt: skip
    choices = tuple(Choice(name, config.alpha_of(name), config.rank(name)) for name in candidates)
    if config.target in (None, "all-linear") and len(depths) == 1:  # it may as well be a layer, which only the base tells
        choices = (Choice(f"{path}.weight", config.alpha_of(path), config.rank(path), plain=True), *choices)
    names = [choice.name for choice in choices][: len(depths)]
    return {name: _wrapper(path, module, depth, choices, config) for name, depth in zip(names, reversed(depths), strict=True)}


def _wrapper(path: str, module: Module, depth: int, choices: tuple[Choice, ...], config: LoraConfig) -> OnParameter:
    slots = [f"{depth}:lora_A", f"{depth}:lora_B"]
    for mine, other in (slots, slots[::-1]):
        if mine not in module.refs:
            raise FormatError(f"has no {mine.partition(':')[2]} beside it", tensor=module.keys[other], remedy="the file is incomplete")
    A, B = (module.refs[slot] for slot in slots)
    a, b = A.spec.shape, B.spec.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        expected = "A [experts·rank, in], B [out, rank·experts]"
        raise ShapeError("A and B do not meet", tensor=module.keys[slots[0]], found=f"A {list(a)}, B {list(b)}", expected=expected)
    return OnParameter(
        A=A, B=B, module=path, depth=depth, choices=choices, rslora=config.rslora, packing=config.packing or PACKINGS[0],
        version=config.version,
    )  # fmt: skip


def check_packing(deltas: Mapping[str, Delta], config: LoraConfig, stated: Mapping[str, Any]) -> None:
    """Raise AmbiguousError for a file that Unsloth wrote and that does not say how: it packed B in both ways, of the same shape."""
    auto = stated.get("auto_mapping")
    theirs = isinstance(auto, Mapping) and given(auto.get("unsloth_fixed"))
    found = next((name for name, delta in deltas.items() if isinstance(delta, OnParameter)), None)
    if theirs and config.packing is None and found is not None:
        raise AmbiguousError(
            "Unsloth wrote it, whose versions pack the experts' B in two ways", tensor=found,
            remedy=f"add lora_B_layout to adapter_config.json: {' or '.join(PACKINGS)}",
        )  # fmt: skip


def parameter_names(deltas: Mapping[str, Delta]) -> list[str]:
    """All parameters that wrappers may be about: what the patterns of a config are matched with."""
    return [choice.name for delta in deltas.values() if isinstance(delta, OnParameter) for choice in delta.choices]


def idle_parameters(config: LoraConfig, deltas: Mapping[str, Delta]) -> Iterable[str]:
    """A note on each entry of `target_parameters` that no tensor of the file can be about."""
    names = parameter_names(deltas)
    idle = [entry for entry in config.parameters if not any(selected((entry,), name) for name in names)]
    return [f"adapter_config.json: target_parameters names {', '.join(idle)}, and the file has nothing there"] if idle else []
