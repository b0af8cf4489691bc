"""RoAd, HiRA and GLoRA as peft has them: the inverse of what `peft_multiplicative` reads.

What a module's bias lacks peft keeps as zeros, whose shapes were read from peft 0.21.2, `tuners/glora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.deltas.base import Additive, Delta
from loratools.deltas.coupled import Coupled
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.deltas.modulated import Modulated, Spread
from loratools.deltas.paired import Paired
from loratools.formats.peft_writing import Modules, Writing, Written, alike, each, refused, weights
from loratools.refs import InMemory, Ref, Spec, same_bytes

_OFF = "none"


def _road(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, Paired)
    settings = {
        "variant": f"road_{alike({path: delta.variant for path, delta in deltas.items()}, 'variant')}",
        "group_size": alike({path: delta.group for path, delta in deltas.items()}, "group_size"),
    }
    for path, leaves in modules.items():
        bias, own = leaves.get("bias"), deltas[path]
        if bias is not None and not (isinstance(bias, Paired) and _same(bias.theta, own.theta) and _same(bias.alpha, own.alpha)):
            raise refused("peft's RoAd turns a bias with its weight, and this otherwise").at(tensor=f"{path}.bias")
    return Written(each(deltas, lambda delta: {"road_theta": delta.theta, "road_alpha": delta.alpha}), settings | {"init_weights": True})


def _same(one: Ref, other: Ref) -> bool:
    return one is other or same_bytes(one, other)


# -- HiRA


def _hira(modules: Modules, stated: Mapping[str, Any]) -> Written:
    lows = {path: _low(path, delta.times) for path, delta in weights(modules, Modulated).items()}
    return Written(each(lows, _hira_slots), {"r": alike({path: low.rank for path, low in lows.items()}, "r"), "init_weights": True})


def _low(path: str, times: Additive) -> LowRank:
    assert isinstance(times, LowRank)
    if times.scaling != 1:
        raise refused("peft's HiRA has no scaling", found=times.scaling).at(tensor=f"{path}.weight")
    return times


def _hira_slots(low: LowRank) -> dict[str, Ref]:
    if low.layer == "embedding":
        return {"hira_embedding_A": low.B.T, "hira_embedding_B": low.A.T}
    straight = low.transposed() if low.layer == "transposed" else low
    ones = (1,) * (len(straight.A.spec.shape) - 2)
    return {"hira_A": straight.A, "hira_B": straight.B.reshape(*straight.B.spec.shape, *ones)}


# -- GLoRA


def _glora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, Modulated)
    biases = {path: leaves.get("bias") for path, leaves in modules.items()}
    kind = alike({path: _kind(delta.times) for path, delta in deltas.items()}, "config_A_B")
    own = {path: bias for path, bias in biases.items() if isinstance(bias, Coupled)}
    vectors = {path: _kind(bias.own.times) for path, bias in own.items() if _kind(bias.own.times) != _OFF}
    columns = {path: _column(bias, stated) for path, bias in own.items() if _column(bias, stated) != _OFF}
    settings = {
        "config_A_B": kind,
        "config_D_E": alike(vectors, "config_D_E") if vectors else stated.get("config_D_E", _OFF),
        "config_C": alike(columns, "config_C") if columns else stated.get("config_C", _OFF),
    }
    ranks = {path: rank for path, delta in deltas.items() for rank in _ranks(delta, own.get(path), settings["config_C"])}
    settings |= {"r": alike(ranks, "r")} if ranks else {"r": stated.get("r", 4)}
    settings["init_weights"] = True
    return Written(each(modules, lambda leaves: _glora_slots(leaves, settings)), settings)


def _kind(part: Additive | None) -> str:
    if isinstance(part, LowRank):
        return "lora"
    return ("constant" if part.single else "vector") if isinstance(part, Spread) else _OFF


def _column(bias: Coupled, stated: Mapping[str, Any]) -> str:
    """What C is: a product, a vector, or off, which is kept as a vector of zeros."""
    if bias.right is not None:
        return "lora"
    told = stated.get("config_C")
    return _OFF if told in (_OFF, "lora") or (told is None and not any(bytes(bias.left.read()))) else "vector"


def _ranks(delta: Modulated, bias: Coupled | None, column: str) -> list[int]:
    found = [part.rank for part in delta.parts if isinstance(part, LowRank)]
    return found + ([bias.left.spec.shape[1]] if bias is not None and column == "lora" and bias.right is not None else [])


def _glora_slots(leaves: Mapping[str, Delta], settings: Mapping[str, Any]) -> dict[str, Ref]:
    weight, bias = leaves["weight"], leaves.get("bias")
    assert isinstance(weight, Modulated)
    slots = _path("A", weight.times) | _path("B", weight.plus)
    if isinstance(bias, Coupled):
        slots |= _path("D", bias.own.times) | _path("E", bias.own.plus)
        if bias.right is not None:
            return slots | {"glora_C.Xd": bias.left, "glora_C.Xu": bias.right}
        off = settings["config_C"] != "vector" or (_kind(bias.own.times) == _OFF and not any(bytes(bias.left.read())))
        return slots | {"glora_C.zeros" if off else "glora_C.X": bias.left}
    if bias is not None:
        raise refused(f"peft's GLoRA cannot say {bias.called} delta of a bias")
    out, width, dtype = *_size(weight), weight.times.refs().popitem()[1].spec.dtype
    return slots | {f"glora_{name}.zeros": _zeros(shape, dtype) for name, shape in (("C", (width, 1)), ("D", (out,)), ("E", (out,)))}


def _size(weight: Modulated) -> tuple[int, int]:
    """(out, in) of a module whose base has no bias, which peft keeps zeros for."""
    shape = weight.times.shape()
    if len(shape) != 2 or (isinstance(weight.times, Spread) and weight.times.size is None):
        raise refused("peft keeps zeros as large as the weight's sides, which only the base tells", remedy="give convert --base BASE")
    return shape[0], shape[1]


def _zeros(shape: tuple[int, ...], dtype: str) -> Ref:
    spec = Spec(dtype, shape)
    return InMemory(spec, bytes(spec.nbytes))


def _path(name: str, part: Additive | None) -> dict[str, Ref]:
    """One of A, B, D and E under the slots of its kind."""
    if isinstance(part, LowRank):
        if part.scaling != 1:
            raise refused("peft's GLoRA has no scaling", found=part.scaling)
        return {f"glora_{name}.Xd": part.B, f"glora_{name}.Xu": part.A}
    if isinstance(part, Spread):
        return {f"glora_{name}.X": part.value}
    if isinstance(part, Full) and part.scale == 1:
        return {f"glora_{name}.zeros": part.diff}
    raise refused(f"peft's GLoRA cannot say {'a missing' if part is None else part.called} part")


def _of_hira(delta: Delta) -> bool:
    return isinstance(delta, Modulated) and delta.plus is None and isinstance(delta.times, LowRank)


def _of_glora(delta: Delta) -> bool:
    return isinstance(delta, Coupled) or (isinstance(delta, Modulated) and delta.plus is not None)


ROAD = Writing((Paired,), _road)
HIRA = Writing((Modulated,), _hira, says=_of_hira, leaves=("weight",))
GLORA = Writing((Modulated, Coupled), _glora, says=_of_glora)
