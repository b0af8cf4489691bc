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
from loratools.deltas.compose import Chain
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import raise_all
from loratools.formats._refused import passengers
from loratools.formats.base import Container
from loratools.formats.peft_attention import apart, target_of
from loratools.formats.peft_config import CARRIED
from loratools.formats.peft_experts_encode import Parameters, Scale, parameters_of
from loratools.formats.peft_keys import ROOT, SAVED
from loratools.formats.peft_lora_encode import Modules, take
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
    faults = passengers(adapter, "peft has")
    deltas, made, whole = apart(adapter), Modules(), dict[str, Ref]()
    parameters = parameters_of(adapter, deltas)
    for name, delta in deltas.items():
        if name in parameters.names:
            continue
        if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
            whole[name], delta = delta.first.value, delta.then
        if isinstance(delta, Replacement):
            whole[name] = delta.value
            continue
        fault = take(name, delta, made)
        faults += [fault] if fault else []
    raise_all([*faults, *parameters.faults, *made.mixed(parameters.names)])
    config = _config(adapter, made, parameters)
    tensors = made.tensors() | {ROOT + key: ref for key, ref in parameters.tensors.items()}
    tensors |= {f"{ROOT}{module}.{MARKER}": rows.values for module, rows in made.tokens.items()}
    tensors |= _saved(whole, made, config)
    metadata = dict(adapter.metadata.get("safetensors", {})) | {"format": "pt"}
    metadata.pop(SAVED, None)
    return Container(tensors, metadata | ({SAVED: json.dumps(sorted(whole))} if whole else {}), config)


def _config(adapter: Adapter, made: Modules, parameters: Parameters) -> dict[str, Any]:
    lows, stated = made.lows, adapter.metadata.get("peft", {})
    targeted = {module: low for module, low in lows.items() if target_of(module) == module}
    scales = {module: Scale(low.rank, low.alpha, low.rslora) for module, low in targeted.items()} | parameters.scales
    rslora = Counter(scale.rslora for scale in scales.values()).most_common(1)[0][0] if scales else False
    ranks = {name: scale.rank for name, scale in scales.items()}
    alphas = {name: _alpha(scale, rslora) for name, scale in scales.items()}
    carried = {name: value for name, value in stated.items() if name in (*CARRIED, "exclude_modules")}
    targets: Any = sorted(targeted) if lows or made.tokens else None if parameters.names else NOTHING
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": None, "task_type": None, "inference_mode": True, "peft_version": WRITTEN_FOR,
        "lora_dropout": 0.0, "revision": None,
        **carried,
        **patterned(ranks, "r", "rank_pattern"), **patterned(alphas, "lora_alpha", "alpha_pattern"),
        "use_rslora": rslora, "use_dora": bool(made.magnitudes), "lora_bias": bool(made.biases), "bias": "none",
        "fan_in_fan_out": _transposed(lows, carried), "init_lora_weights": made.init or True, "target_modules": targets,
        "modules_to_save": None, **made.settings(stated),
        **({"target_parameters": sorted(parameters.scales), "peft_version": parameters.version} if parameters.names else {}),
    }  # fmt: skip
    return dict(sorted(config.items()))


def _transposed(lows: Mapping[str, LowRank], carried: Mapping[str, Any]) -> bool:
    known = [low.layer for low in lows.values() if low.layer != "unknown"]
    return "transposed" in known if known else bool(carried.get("fan_in_fan_out"))


def _alpha(scale: Scale, rslora: bool) -> float:
    """The alpha that says a module's scaling under the adapter's one rslora flag; whole numbers as such."""
    alpha = scale.alpha
    if scale.rslora != rslora:
        alpha = scale.alpha * math.sqrt(scale.rank) if scale.rslora else scale.alpha / math.sqrt(scale.rank)
    return shortest(alpha)


def _saved(whole: Mapping[str, Ref], made: Modules, config: dict[str, Any]) -> dict[str, Ref]:
    """Whole tensors under peft's keys, their modules entered in the config: biases as `bias`, others as `modules_to_save`."""
    tensors, modules, loose = saved(whole, made.lows, made.tokens)
    if loose:
        adapted = {path.replace(".base_layer.", ".") for path in (*made.lows, *made.tokens)}
        config["bias"] = "lora_only" if all(name.removesuffix(".bias") in adapted for name in loose) else "all"
    config["modules_to_save"] = modules or None
    return tensors
