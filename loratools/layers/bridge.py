"""Between a model with layers and an `Adapter`: what was trained as deltas, and deltas as layers in a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, OptionError, ShapeError, UnsupportedError, raise_all
from loratools.families import Family
from loratools.layers._dora import DoRALayer
from loratools.layers._linear import is_conv1d
from loratools.layers.base import LoRALayer
from loratools.layers.inject import layer_for, replace_modules, trainable
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref


def adapter_from(model: nn.Module, *, metadata: Mapping[str, Any] | None = None) -> Adapter:
    """A trained model's layers as deltas, and every other parameter that trains (a head, biases) as a saved tensor.

    Names are the model's own tensor names; the tensors are copied. Raises OptionError for a model that has neither.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> from loratools.layers import inject
    >>> inject(model, "0", rank=1, alpha=1), list(adapter_from(model))
    (('0',), ['0.weight'])
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    deltas = {_join(name, "weight"): layer.delta() for name, layer in layers.items()}
    own = {id(parameter) for layer in layers.values() for parameter in _factors(layer)}
    for name, parameter in trainable(model).items():
        if id(parameter) in own:
            continue
        whole = Replacement(value=to_ref(parameter.detach().clone()))
        deltas[name] = Chain(first=whole, then=deltas[name]) if name in deltas else whole
    if not deltas:
        raise OptionError("the model has no low-rank layer and nothing that trains")
    dropouts = {layer.settings.dropout for layer in layers.values()}
    config = {"lora_dropout": dropouts.pop()} if len(dropouts) == 1 else {}
    return Adapter(deltas, metadata={"peft": config, **(metadata or {})})


def _factors(layer: LoRALayer) -> Iterator[nn.Parameter]:
    yield layer.lora_A
    yield layer.lora_B
    if isinstance(layer, DoRALayer):
        yield layer.magnitude


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def attach(model: nn.Module, adapter: Adapter, *, renames: Iterable[tuple[str, str]] = ()) -> tuple[str, ...]:
    """Put an adapter on a model: a layer for each LoRA and DoRA, saved tensors and bias differences into their parameters.

    Returns the names of the tensors changed. Raises, before the model is touched, what `Adapter.resolve` raises and
    UnsupportedError for deltas that no layer has.

    >>> from loratools.layers import inject
    >>> trained, fresh = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 2))
    >>> inject(trained, "0", rank=1, alpha=1), attach(fresh, adapter_from(trained))
    (('0',), ('0.weight',))
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    specs = {name: to_spec(tensor) for name, tensor in tensors.items()}
    resolved = adapter.resolve(specs, _family(model), renames=renames)
    layers: dict[str, Delta] = {}
    whole: dict[str, Replacement | Full] = {}
    faults: list[LoratoolsError] = []
    for name, delta in resolved.items():
        try:
            _sort(name, delta, specs, layers, whole)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    replace_modules(model, {name.rpartition(".")[0]: partial(wear, delta=delta) for name, delta in layers.items()})
    for name, change in whole.items():
        _write(tensors[name], change)
    return tuple(resolved)


def to_spec(tensor: Tensor) -> Spec:
    """A tensor's spec; its data, which may be on no device at all, is not touched."""
    return replace(to_ref(torch.empty(0, dtype=tensor.dtype)).spec, shape=tuple(tensor.shape))


def _family(model: nn.Module) -> Family:
    """Which weights are stored transposed, told by the modules themselves; a looked-up weight is, next to loralib's factors."""
    turned = [_join(name, "weight") for name, module in model.named_modules() if is_conv1d(module) or isinstance(module, nn.Embedding)]
    return Family({"model_type": "told by its modules"}, more_transposed=tuple(turned))


def _sort(name: str, delta: Delta, specs: Mapping[str, Spec], layers: dict[str, Delta], whole: dict[str, Replacement | Full]) -> None:
    if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
        _sort(name, delta.first, specs, layers, whole)
        delta = delta.then
    if isinstance(delta, Replacement | Full):
        if name not in specs or specs[name].shape != delta.spec(specs[name]).shape:
            found, expected = delta.spec(None).shape, specs[name].shape if name in specs else None
            raise ShapeError("the model has no such parameter of this shape", found=list(found), expected=expected and list(expected))
        whole[name] = delta
    elif isinstance(delta, LowRank) or (isinstance(delta, DoRA) and isinstance(delta.direction, LowRank)):
        if not name.endswith("weight"):
            raise UnsupportedError("a low-rank change of a tensor that is no module's weight")
        layers[name] = delta
    else:
        raise UnsupportedError(f"no layer for {delta.called} delta")


@torch.no_grad()
def _write(tensor: Tensor, change: Replacement | Full) -> None:
    if isinstance(change, Replacement):
        tensor.copy_(read_tensor(change.value))
    else:
        wide = tensor.to("cpu", torch.float64) + change.scale * read_tensor(change.diff, torch.float64)
        tensor.copy_(wide.to(tensor.dtype))


def wear(base: nn.Module, delta: Delta, *, fan_in_fan_out: bool | None = None) -> LoRALayer:
    """The layer that does to a plain module what a delta of its stored weight does.

    Raises ShapeError where the two do not meet, UnsupportedError for deltas that no layer has.

    >>> low = LowRank(A=to_ref(torch.ones(1, 3)), B=to_ref(torch.ones(2, 1)), alpha=1)
    >>> wear(nn.Linear(3, 2), low).rank
    1
    """
    low = _low_rank(delta)
    turned = isinstance(base, nn.Embedding) or is_conv1d(base) or bool(fan_in_fan_out)
    axis = delta.axis if isinstance(delta, DoRA) else "out"
    axis = {"out": "in", "in": "out"}[axis] if turned else axis
    options: dict[str, Any] = {"rank": low.rank, "alpha": low.alpha, "rslora": low.rslora}
    layer = layer_for(base, dora=isinstance(delta, DoRA), axis=axis, fan_in_fan_out=fan_in_fan_out, **options)
    delta.spec(to_spec(layer.weight))
    device = str(layer.weight.device)
    A, B = read_tensor(low.A, device=device), read_tensor(low.B, device=device)
    A, B = (B.T.contiguous(), A.T.contiguous()) if turned else (A, B)
    layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
    if isinstance(layer, DoRALayer) and isinstance(delta, DoRA):
        layer.magnitude = nn.Parameter(read_tensor(delta.magnitude, device=device).reshape(-1))
    return layer


def layer_of(weight: Tensor, delta: Delta, bias: Tensor | None = None) -> LoRALayer:
    """A layer around a bare weight, of the kind that `delta` says: how a merge is checked without the model's code.

    `weight` is (out, in), (out, in, *kernel), (num, dim) or, for "transposed", (in, out), as it is stored. A convolution has
    stride 1 and no padding. Raises UnsupportedError for kinds without a layer.

    >>> low = LowRank(A=to_ref(torch.ones(1, 3)), B=to_ref(torch.ones(2, 1)), alpha=1, layer="linear")
    >>> layer_of(torch.zeros(2, 3), low)(torch.ones(3)).tolist()
    [3.0, 3.0]
    """
    kind = _low_rank(delta).layer
    if kind != "transposed":
        return wear(plain_layer(weight, kind, bias), delta)
    return wear(plain_layer(weight.T.contiguous(), "linear", bias), delta, fan_in_fan_out=True)


def plain_layer(weight: Tensor, kind: str, bias: Tensor | None = None) -> nn.Module:
    """The plain layer of a weight, by `LowRank.layer`'s word for it; it shares the tensor."""
    options: dict[str, Any] = {"device": "meta"}
    if kind == "embedding":
        made: nn.Module = nn.Embedding(*weight.shape, **options)
    elif kind == "conv":
        conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.dim()]
        made = conv(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=bias is not None, **options)  # type: ignore[arg-type]
    else:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, **options)
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def _low_rank(delta: Delta) -> LowRank:
    direction = delta.direction if isinstance(delta, DoRA) else delta
    if not isinstance(direction, LowRank):
        raise UnsupportedError(f"no layer for {delta.called} delta")
    return direction
