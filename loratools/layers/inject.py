"""Putting layers into a model, freezing the rest, and the state dict of what trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, Unpack

import torch
from torch import Tensor, nn

from loratools.errors import LoratoolsError, MatchError, OptionError, UnsupportedError, raise_all
from loratools.layers._conv import conv_class
from loratools.layers._dora import DoRAConv2d, DoRAEmbedding, DoRALayer, DoRALinear
from loratools.layers._embedding import LoRAEmbedding
from loratools.layers._linear import LoRALinear, is_conv1d
from loratools.layers.base import LoRALayer, Options

Make: TypeAlias = Callable[[nn.Module], LoRALayer]
Targets: TypeAlias = "str | Iterable[str] | Callable[[str, nn.Module], bool]"
BIASES = ("none", "all", "lora_only")


def inject(
    model: nn.Module, targets: Targets, *, dora: bool = False, axis: str = "out", make: Make | None = None, **settings: Unpack[Options]
) -> tuple[str, ...]:
    """Put a LoRA (or DoRA) layer in the place of each module that `targets` choose; returns their names.

    `targets` are globs over module names or their endings (`q_proj`, `layers.*.fc?`), or a predicate (name, module) → bool;
    `make` builds another layer from the plain one. The layers' own weights are frozen, `freeze` does it for the rest. Raises,
    before the model is touched, MatchError for a glob that fits nothing and UnsupportedError for modules without a layer.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> inject(model, ["0", "2"], rank=2, alpha=4)
    ('0', '2')
    """
    chosen = _chosen(model, targets)
    build = make or (lambda base: layer_for(base, dora=dora, axis=axis, **settings))
    return replace_modules(model, dict.fromkeys(chosen, build))


def layer_for(
    base: nn.Module, *, dora: bool = False, axis: str = "out", fan_in_fan_out: bool | None = None, **settings: Unpack[Options]
) -> LoRALayer:
    """The layer that takes a plain module's place; UnsupportedError where there is none.

    >>> type(layer_for(nn.Embedding(4, 2), rank=1, alpha=1)).__name__
    'LoRAEmbedding'
    """
    if isinstance(base, LoRALayer):
        raise UnsupportedError("has a low-rank layer already", found=type(base).__name__)
    if isinstance(base, nn.Linear) or is_conv1d(base):
        if dora:
            return DoRALinear(base, axis=axis, fan_in_fan_out=fan_in_fan_out, **settings)
        return LoRALinear(base, fan_in_fan_out=fan_in_fan_out, **settings)
    if isinstance(base, nn.Embedding):
        return DoRAEmbedding(base, axis=axis, **settings) if dora else LoRAEmbedding(base, **settings)
    plain = conv_class(base)
    if not dora:
        return plain(base, **settings)
    if axis != "out" or not isinstance(base, nn.Conv2d):
        raise UnsupportedError("no DoRA for this layer and axis", found=f"{type(base).__name__}, {axis}", expected="Conv2d, out")
    return DoRAConv2d(base, **settings)


def _chosen(model: nn.Module, targets: Targets) -> list[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    modules.pop("")
    if callable(targets):
        found = [name for name, module in modules.items() if targets(name, module)]
        if not found:
            raise MatchError("the predicate chooses no module")
        return found
    globs = [targets] if isinstance(targets, str) else list(targets)
    if not globs:
        raise OptionError("no targets")
    hits = {glob: [name for name in modules if fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")] for glob in globs}
    faults: list[LoratoolsError] = []
    for glob, names in hits.items():
        if not names:
            faults.append(MatchError("no module fits this target", found=glob, expected=f"one of {', '.join(list(modules)[:4])}, …"))
        elif not any(_adaptable(modules[name]) for name in names):
            faults.append(UnsupportedError(f"no module of {glob} has a low-rank layer", found=type(modules[names[0]]).__name__))
    raise_all(faults)
    wanted = {name for names in hits.values() for name in names}
    return [name for name, module in modules.items() if name in wanted and _adaptable(module)]


def _adaptable(module: nn.Module) -> bool:
    kinds = (LoRALayer, nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(module, kinds) or is_conv1d(module)


def replace_modules(model: nn.Module, builders: dict[str, Make]) -> tuple[str, ...]:
    """Put what each builder makes of the module of its name in its place, all or none; a shared module is replaced once."""
    modules = dict(model.named_modules(remove_duplicate=False))
    faults: list[LoratoolsError] = []
    made: dict[int, LoRALayer] = {}
    names: dict[str, int] = {}
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for name, build in builders.items():
        module = modules[name]
        try:
            _check_place(name, modules)
            if id(module) not in made:
                made[id(module)] = build(module)
            names[name] = id(module)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    if faults:
        for parameter, flag in trained:  # a layer that was made froze what it took over
            parameter.requires_grad_(flag)
    raise_all(faults)
    _note_ties(model, {name: made[key] for name, key in names.items()}, modules)
    for name, module in modules.items():
        if id(module) in made:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, made[id(module)])
    return tuple(names)


def _check_place(name: str, modules: dict[str, nn.Module]) -> None:
    """Raise UnsupportedError where the parent reads the weight itself, past the layer's forward."""
    parent = modules.get(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        raise UnsupportedError("nn.MultiheadAttention reads this weight itself, a layer's forward would not be called")
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        remedy = "turn it off: torch.backends.mha.set_fastpath_enabled(False)"
        raise UnsupportedError("nn.TransformerEncoderLayer's fast path reads this weight itself", remedy=remedy)


def _note_ties(model: nn.Module, layers: dict[str, LoRALayer], modules: dict[str, nn.Module]) -> None:
    """Tell each layer which parameter elsewhere is its weight too, so that `merge` refuses to change both."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(f"{name}.{leaf}" if name else leaf)
    for name, layer in layers.items():
        same = {other for other, module in modules.items() if module is modules[name]}
        others = [owner for owner in owners[id(layer.weight)] if owner.rpartition(".")[0] not in same]
        layer.tied_to = others[0] if others else None


def freeze(model: nn.Module, *, bias: str = "none", train: Iterable[str] = ()) -> None:
    """Let the low-rank parameters train and nothing else, but biases as loralib's `bias` says and what the globs in `train` name.

    `bias`: "none", "all" or "lora_only" (those of adapted layers). A glob is over parameter names or their modules' names.
    Raises MatchError for a glob that fits nothing.
    """
    _check_bias(bias)
    globs = list(train)
    own = {name for name, _ in _own(model)}
    biases = {f"{name}.bias".lstrip(".") for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    parameters = dict(model.named_parameters())
    for glob in globs:
        if not any(_covers(glob, name) for name in parameters):
            raise MatchError("no parameter fits this glob", found=glob)
    for name, parameter in parameters.items():
        is_bias = name.rpartition(".")[2] == "bias"
        asked = any(_covers(glob, name) for glob in globs)
        by_bias = is_bias and (bias == "all" or (bias == "lora_only" and name in biases))
        parameter.requires_grad_(name in own or asked or by_bias)


def _covers(glob: str, name: str) -> bool:
    module = name.rpartition(".")[0]
    return any(fnmatchcase(text, pattern) for text in (name, module) for pattern in (glob, f"*.{glob}", f"{glob}.*", f"*.{glob}.*"))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> inject(model, "0", rank=1, alpha=1), list(trainable(model))
    (('0',), ['0.lora_A', '0.lora_B'])
    """
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """The tensors of the low-rank layers by name, with biases as loralib adds them: "none", "all" or "lora_only"."""
    _check_bias(bias)
    table: dict[str, Any] = model.state_dict()
    own = {name for name, _ in _own(model)}
    if bias == "lora_only":
        own |= {f"{name}.bias".lstrip(".") for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    return {name: tensor for name, tensor in table.items() if name in own or (bias == "all" and name.rpartition(".")[2] == "bias")}


def _own(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that low-rank layers added, under every name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRALayer):
            prefix = f"{name}." if name else ""
            yield f"{prefix}lora_A", module.lora_A
            yield f"{prefix}lora_B", module.lora_B
            if isinstance(module, DoRALayer):
                yield f"{prefix}magnitude", module.magnitude


def _check_bias(bias: str) -> None:
    if bias not in BIASES:
        raise OptionError("bias", found=bias, expected="none, all or lora_only")
