"""Writing peft's LoRA: the smallest folder that peft loads without a warning and that says every scale exactly.

The commonest rank, alpha and flags go into the config, the others into `rank_pattern` and `alpha_pattern` under anchored,
escaped names. What peft's LoRA cannot say is NotExpressible, all of it at once, before anything is written; adapters of its other
methods go by `peft_method_encode`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.residual import INITS
from loratools.deltas.rows import Rows
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats.base import Container
from loratools.formats.peft_attention import apart, target_of
from loratools.formats.peft_config import CARRIED
from loratools.formats.peft_keys import ROOT, SAVED
from loratools.formats.peft_method_encode import encode_method, row_for
from loratools.formats.peft_tokens import MARKER
from loratools.formats.peft_writing import WRITTEN_FOR, patterned, saved, shortest
from loratools.refs import Ref

NOTHING = "dummy-target-modules"  # peft 0.21.2 utils/constants.py::DUMMY_TARGET_MODULES: without it peft refuses whole tensors alone


def encode(adapter: Adapter) -> Container:
    """The adapter as peft's config and tensors; factors and magnitudes keep their bytes.

    An adapter of one of peft's other methods, without any LoRA, is written as that method by its row of `peft_methods`.
    """
    row = row_for(adapter)
    if row is not None:
        return encode_method(adapter, row)
    faults: list[LoratoolsError] = [NotExpressible("peft has no place for it", tensor=name) for name in adapter.passengers]
    lows: dict[str, LowRank] = {}
    magnitudes: dict[str, Ref] = {}
    whole: dict[str, Ref] = {}
    biases: dict[str, Full] = {}
    tokens: dict[str, Rows] = {}
    for name, delta in apart(adapter).items():
        if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
            whole[name], delta = delta.first.value, delta.then
        if isinstance(delta, Rows) and name.endswith(".weight"):
            tokens[name.removesuffix(".weight")] = delta
            continue
        fault = _take(name, delta, lows, magnitudes, whole, biases)
        faults += [fault] if fault else []
    faults += _mixed(lows, magnitudes, biases)
    raise_all(faults)
    config = _config(adapter, lows, magnitudes, biases, tokens)
    tensors = _tensors(lows, magnitudes, biases)
    tensors |= {f"{ROOT}{module}.{MARKER}": rows.values for module, rows in tokens.items()}
    tensors |= _saved(whole, lows, tokens, config)
    metadata = dict(adapter.metadata.get("safetensors", {})) | {"format": "pt"}
    metadata.pop(SAVED, None)
    return Container(tensors, metadata | ({SAVED: json.dumps(sorted(whole))} if whole else {}), config)


def _take(
    name: str, delta: Delta, lows: dict[str, LowRank], magnitudes: dict[str, Ref], whole: dict[str, Ref], biases: dict[str, Full]
) -> LoratoolsError | None:
    module, _, leaf = name.rpartition(".")
    direction = delta.direction if isinstance(delta, DoRA) else delta
    if isinstance(direction, LowRank) and leaf == "weight":
        lows[module] = direction
        if isinstance(delta, DoRA):
            magnitudes[module] = delta.magnitude
            if direction.layer != "unknown" and delta.axis != ("in" if direction.layer in ("transposed", "embedding") else "out"):
                found, remedy = list(delta.magnitude.spec.shape), "convert --magnitude-axis out --base BASE refits it"
                return NotExpressible("peft has no DoRA along this axis", tensor=name, found=found, remedy=remedy)
        return None
    if isinstance(delta, Replacement):
        whole[name] = delta.value
        return None
    if isinstance(delta, Full) and leaf == "bias":
        biases[module] = delta
        return None
    if delta.kind in ("parameter", "experts"):
        return NotExpressible("peft's LoRA on parameters is read and merged, not written", tensor=name)
    if isinstance(delta, DoRA) and isinstance(direction, LowRank):
        remedy = "write --format loratools, which keeps it"
        return NotExpressible("peft has no DoRA of what is no layer's weight", tensor=name, remedy=remedy)
    if isinstance(delta, DoRA) and isinstance(direction, Additive):
        remedy = "convert --kind lora makes a direction of it, --format loratools keeps it"
        return NotExpressible(f"peft's LoRA cannot say a DoRA of {direction.called} direction", tensor=name, remedy=remedy)
    remedy = "give the adapter as it was initialised with --initial" if delta.kind in INITS else "convert it first"
    return NotExpressible(f"peft's LoRA cannot say {delta.called} delta", tensor=name, remedy=remedy)


def _mixed(lows: Mapping[str, LowRank], magnitudes: Mapping[str, Ref], biases: Mapping[str, Full]) -> list[LoratoolsError]:
    faults: list[LoratoolsError] = []
    if magnitudes and len(magnitudes) < len(lows):
        plain = next(module for module in lows if module not in magnitudes)
        fact = "peft's use_dora holds for the whole adapter, and this module is plain LoRA"
        faults.append(NotExpressible(fact, tensor=f"{plain}.weight"))
    bare = [module for module, low in lows.items() if module not in biases and low.layer != "embedding"]
    if biases and bare:
        faults.append(NotExpressible("peft's lora_bias holds for the whole adapter, and this module has none", tensor=f"{bare[0]}.bias"))
    if magnitudes and biases:
        faults.append(NotExpressible("peft allows no lora_bias beside DoRA", tensor=f"{next(iter(biases))}.bias"))
    for module, bias in biases.items():
        low = lows.get(module)
        if low is None or low.layer == "embedding" or bias.scale != low.scaling:
            faults.append(NotExpressible("a bias difference needs a LoRA of the same scaling on its module", tensor=f"{module}.bias"))
    return faults


def _config(
    adapter: Adapter, lows: Mapping[str, LowRank], magnitudes: Mapping[str, Ref], biases: Mapping[str, Full], tokens: Mapping[str, Rows]
) -> dict[str, Any]:
    rslora = Counter(low.rslora for low in lows.values()).most_common(1)[0][0] if lows else False
    targeted = {module: low for module, low in lows.items() if target_of(module) == module}
    ranks = {module: low.rank for module, low in targeted.items()}
    alphas = {module: _alpha(low, rslora) for module, low in targeted.items()}
    transposed = [low.layer == "transposed" for low in lows.values()]
    kept = (*CARRIED, "exclude_modules")  # of another method's config the rest would be no field of a LoRA's
    carried = {name: value for name, value in adapter.metadata.get("peft", {}).items() if name in kept}
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": None, "task_type": None, "inference_mode": True, "peft_version": WRITTEN_FOR,
        "lora_dropout": 0.0, "revision": None,
        **carried,
        **patterned(ranks, "r", "rank_pattern"), **patterned(alphas, "lora_alpha", "alpha_pattern"),
        "use_rslora": rslora, "use_dora": bool(magnitudes), "lora_bias": bool(biases), "bias": "none",
        "fan_in_fan_out": any(transposed) if any(low.layer != "unknown" for low in lows.values()) else bool(carried.get("fan_in_fan_out")),
        "init_lora_weights": True,
        "target_modules": sorted(targeted) if lows or tokens else NOTHING,
        "modules_to_save": None,
        **({"trainable_token_indices": {module: list(rows.indices) for module, rows in sorted(tokens.items())}} if tokens else {}),
    }  # fmt: skip
    return dict(sorted(config.items()))


def _alpha(low: LowRank, rslora: bool) -> float:
    """The alpha that says a module's scaling under the adapter's one rslora flag; whole numbers as such."""
    alpha = low.alpha
    if low.rslora != rslora:
        alpha = low.alpha * math.sqrt(low.rank) if low.rslora else low.alpha / math.sqrt(low.rank)
    return shortest(alpha)


def _tensors(lows: Mapping[str, LowRank], magnitudes: Mapping[str, Ref], biases: Mapping[str, Full]) -> dict[str, Ref]:
    tensors: dict[str, Ref] = {}
    for module, low in lows.items():
        root, magnitude = ROOT + module, magnitudes.get(module)
        if low.layer == "embedding":
            tensors |= {f"{root}.lora_embedding_A": low.B.T, f"{root}.lora_embedding_B": low.A.T}
        else:
            written = low.transposed() if low.layer == "transposed" else low
            ones = (1,) * (len(low.A.spec.shape) - 2)
            tensors |= {f"{root}.lora_A.weight": written.A, f"{root}.lora_B.weight": written.B.reshape(*written.B.spec.shape, *ones)}
        if magnitude is not None:
            size, kernel = magnitude.spec.numel, len(low.A.spec.shape) - 2
            shape = (1, size, *(1,) * kernel) if low.layer == "conv" else (size,)
            tensors[f"{root}.lora_magnitude_vector"] = magnitude.reshape(*shape)
        if module in biases:
            tensors[f"{root}.lora_B.bias"] = biases[module].diff
    return tensors


def _saved(
    whole: Mapping[str, Ref], lows: Mapping[str, LowRank], tokens: Mapping[str, Rows], config: dict[str, Any]
) -> dict[str, Ref]:
    """Whole tensors under peft's keys, their modules entered in the config: biases as `bias`, others as `modules_to_save`."""
    tensors, modules, loose = saved(whole, lows, tokens)
    if loose:
        adapted = {path.replace(".base_layer.", ".") for path in (*lows, *tokens)}
        config["bias"] = "lora_only" if all(name.removesuffix(".bias") in adapted for name in loose) else "all"
    config["modules_to_save"] = modules or None
    return tensors
