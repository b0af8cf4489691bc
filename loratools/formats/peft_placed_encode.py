"""Fourier and wavelet coefficients, numbers at single places, biases and whole tensors as peft has them.

The inverse of what `peft_placed` reads; how many numbers peft makes of a config was read from peft 0.21.2, `tuners/<method>/layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratools.deltas.base import Additive, Delta
from loratools.deltas.fourierft import FourierFT
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rows import Rows
from loratools.deltas.sparse import Sparse
from loratools.deltas.summed import Sum
from loratools.deltas.waveft import WaveFT
from loratools.formats.peft_targets import selected
from loratools.formats.peft_writing import Modules, Writing, Written, alike, dotted_patterned, each, patterned, refused, shortest, weights
from loratools.refs import Ref

_BASE = "give convert --base BASE"


def _fourierft(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, FourierFT)
    settings = dotted_patterned({path: delta.spectrum.spec.numel for path, delta in deltas.items()}, "n_frequency", "n_frequency_pattern")
    return Written(each(deltas, lambda delta: {"fourierft_spectrum": delta.spectrum}), settings | _drawn(deltas))


def _waveft(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, WaveFT)
    shares = alike({path: delta.bank is not None for path, delta in deltas.items()}, "proportional_parameters")
    if shares:
        banks = {path: delta.bank.rank for path, delta in deltas.items() if delta.bank is not None}
        settings = {"n_frequency": alike(banks, "n_frequency"), "n_frequency_pattern": {}}
    else:
        counts = {path: delta.spectrum.spec.numel for path, delta in deltas.items()}
        settings = patterned(counts, "n_frequency", "n_frequency_pattern")
    wavelet = alike({path: delta.wavelet for path, delta in deltas.items()}, "wavelet_family")
    settings |= {"proportional_parameters": shares, "use_idwt": wavelet is not None}
    settings["wavelet_family"] = wavelet or stated.get("wavelet_family", "db1")
    return Written(each(deltas, lambda delta: {"waveft_spectrum": delta.spectrum}), settings | _drawn(deltas))


def _drawn(deltas: Mapping[str, FourierFT] | Mapping[str, WaveFT]) -> dict[str, Any]:
    """What both methods have: the seed of the places, and the scale."""
    return {
        "random_loc_seed": alike({path: delta.seed for path, delta in deltas.items()}, "random_loc_seed"),
        "scaling": shortest(alike({path: delta.scale for path, delta in deltas.items()}, "scaling")),
        "init_weights": True,
    }


# -- numbers at single places


def _shira(modules: Modules, stated: Mapping[str, Any]) -> Written:
    """peft makes r·(in + out) numbers of each weight."""
    deltas = weights(modules, Sparse)
    told = {path: _shira_rank(path, delta, stated) for path, delta in deltas.items()}
    tensors = each(deltas, lambda delta: {"shira_weight": delta.values, "shira_indices": delta.places})
    return Written(tensors, {"r": alike(told, "r"), "init_weights": True})


def _shira_rank(path: str, delta: Sparse, stated: Mapping[str, Any]) -> int:
    count, told = delta.values.spec.numel, stated.get("r")
    if delta.size is None and type(told) is int:
        return told
    rank, rest = divmod(count, sum(delta.size)) if delta.size else (0, 1)
    if rest or not rank:
        fact = "peft's SHiRA has r·(in + out) numbers for each weight" + ("" if delta.size else ", whose sides only the base tells")
        raise refused(fact, found=count, **({} if delta.size else {"remedy": _BASE})).at(tensor=f"{path}.weight")
    return rank


def _supertuning(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = {path: leaves["weight"] for path, leaves in modules.items()}
    sparse = {path: _sparse(delta) for path, delta in deltas.items()}
    lows = {path: _low(delta) for path, delta in deltas.items()}
    alike({path: low is not None for path, low in lows.items()}, "r")
    beside = {path: low for path, low in lows.items() if low is not None}
    tensors = each(sparse, lambda one: {"supertuning_values": one.values, "supertuning_indices": one.places})
    tensors |= each(beside, lambda low: {"supertuning_lora_A.weight": low.A, "supertuning_lora_B.weight": low.B})
    settings: dict[str, Any] = {"r": None, "lora_alpha": None}
    if beside:
        alphas = {path: low.scaling * low.rank if low.rslora else low.alpha for path, low in beside.items()}
        settings = {"r": alike({path: low.rank for path, low in beside.items()}, "r"), "lora_alpha": shortest(alike(alphas, "lora_alpha"))}
    settings |= {"sparsity": _sparsity(sparse, stated), "save_precomputed_indices": True, "init_weights": True}
    return Written(tensors, settings)


def _sparse(delta: Delta) -> Sparse:
    one = delta.parts[0] if isinstance(delta, Sum) else delta
    assert isinstance(one, Sparse)
    return one


def _low(delta: Delta) -> LowRank | None:
    other = delta.parts[1] if isinstance(delta, Sum) else None
    return other if isinstance(other, LowRank) else None


def _sparsity(deltas: Mapping[str, Sparse], stated: Mapping[str, Any]) -> float:
    """The share of a weight that is left alone, from which peft makes as many numbers as each has."""
    sizes = {path: (delta.values.spec.numel, math.prod(delta.size)) for path, delta in deltas.items() if delta.size is not None}
    told = stated.get("sparsity")
    path = next(iter(deltas))
    if len(sizes) < len(deltas):
        if isinstance(told, int | float):
            return float(told)
        fact = "peft's Super-Tuning tells by a share of the weight's size how many numbers there are, and only the base tells that"
        raise refused(fact, remedy=_BASE).at(tensor=f"{path}.weight")
    near = [1 - (count + 0.5) / size for count, size in sizes.values()]
    for share in (*([float(told)] if isinstance(told, int | float) else []), *near, sum(near) / len(near)):
        if share >= 0 and all(int(size * (1 - share)) == count for count, size in sizes.values()):
            return share
    raise refused("peft's Super-Tuning has one share of each weight, and these have others").at(tensor=f"{path}.weight")


def of_places(delta: Delta) -> bool:
    """Whether places are told by one number each, as Super-Tuning tells them, alone or with a LoRA beside."""
    parts: tuple[Additive, ...] = delta.parts if isinstance(delta, Sum) else (delta,) if isinstance(delta, Sparse) else ()
    known = bool(parts) and isinstance(parts[0], Sparse) and len(parts[0].places.spec.shape) == 1
    return known and (len(parts) == 1 or (len(parts) == 2 and isinstance(parts[1], LowRank)))


# -- biases, rows and whole tensors


def _beft(modules: Modules, stated: Mapping[str, Any]) -> Written:
    return Written(each(weights(modules, Full, "bias"), lambda bias: {"beft_bias": _beft_row(bias)}, "bias"), {"init_weights": True})


def _beft_row(bias: Full) -> Ref:
    if bias.scale != 1:
        raise refused("peft's BEFT has no scaling", found=bias.scale, remedy="rescale --bake moves it into the numbers")
    return bias.diff.reshape(1, bias.diff.spec.numel)


def _ln_tuning(modules: Modules, stated: Mapping[str, Any]) -> Written:
    """Under the module that the config targets: a tensor of its own by its name, one of a module within by its path."""
    target = stated.get("target_modules")
    tensors: dict[str, Ref] = {}
    targets: set[str] = set()
    for path, leaves in modules.items():
        module, within = _targeted(path, target)
        targets.add(module)
        for leaf, delta in leaves.items():
            assert isinstance(delta, Replacement)
            slot = f"default.{within}.{leaf}" if within else leaf
            tensors[f"{module}.ln_tuning_layers.{slot}"] = delta.value
    return Written(tensors, {}, targets=sorted(targets))


def _targeted(path: str, target: Any) -> tuple[str, str]:
    """A module's path as that of the module above it that the config has, and what is within that; itself and nothing where none is."""
    parts = path.split(".")
    known = isinstance(target, str | list) and not selected(target, path)
    above = (count for count in range(len(parts) - 1, 0, -1) if known and selected(target, ".".join(parts[:count])))
    count = next(above, len(parts))
    return ".".join(parts[:count]), ".".join(parts[count:])


def _tokens(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, Rows)
    indices = alike({path: list(delta.indices) for path, delta in deltas.items()}, "token_indices")
    return Written(each(deltas, lambda delta: {"trainable_tokens_delta": delta.values}), {"token_indices": indices, "init_weights": True})


FOURIERFT = Writing((FourierFT,), _fourierft, leaves=("weight",))
WAVEFT = Writing((WaveFT,), _waveft, leaves=("weight",))
SHIRA = Writing((Sparse,), _shira, says=lambda delta: not of_places(delta), leaves=("weight",))
SUPERTUNING = Writing((Sparse, Sum), _supertuning, says=of_places, leaves=("weight",))
BEFT = Writing((Full,), _beft, leaves=("bias",))
LN_TUNING = Writing((Replacement,), _ln_tuning, says=lambda delta: isinstance(delta, Replacement) and delta.alike, leaves=None)
TRAINABLE_TOKENS = Writing((Rows,), _tokens, leaves=("weight",))
