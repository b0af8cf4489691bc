"""Writing diffusers' LoRA: one file whose metadata is each part's LoraConfig, as `save_lora_weights` of diffusers 0.42 writes it.

The commonest rank and alpha of a part go into its config, the others into `rank_pattern` and `alpha_pattern` under anchored, escaped
names. peft reads them, so what its LoRA cannot say is NotExpressible, all of it at once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats._mixed import mixed
from loratools.formats._refused import KEPT, passengers
from loratools.formats._spelt import alpha_of, orientation
from loratools.formats.base import Container
from loratools.formats.diffusers import METADATA, NAME, PARTS
from loratools.refs import Ref

_SINGLE_FILE = ("model.diffusion_model.", "diffusion_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "first_stage_model.")


@dataclass
class _Part:
    """A model of the pipeline: its modules' deltas by their paths within it."""

    lows: dict[str, LowRank] = field(default_factory=dict)
    magnitudes: dict[str, Ref] = field(default_factory=dict)
    biases: dict[str, Full] = field(default_factory=dict)


def encode(adapter: Adapter) -> Container:
    """The adapter as diffusers loads it, under its pipeline's names or those of a model that stands alone.

    Raises NotExpressible for flat names, which only a base gives back their dots, for names of another layout, and for all but LoRA,
    DoRA along the outputs and LoRA's biases.
    """
    faults = passengers(adapter, "diffusers' files have")
    if adapter.flat:
        fact, remedy = "where its name has dots only the base tells", "give the base with --base"
        raise_all([*faults, NotExpressible(fact, tensor=next(iter(adapter), None), remedy=remedy)])
    faults += orientation(adapter)
    parts: dict[str, _Part] = {}
    grouped = any(name.partition(".")[0] in PARTS for name in adapter)
    for name, delta in adapter.items():
        try:
            prefix, path = _place(name, grouped)
            _take(parts.setdefault(prefix, _Part()), path, delta)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    for prefix, part in parts.items():
        faults += _mixed(prefix, part)
    raise_all(faults)
    said = {f"{prefix}{key}": value for prefix, part in parts.items() for key, value in _config(part).items()}
    tensors = {f"{prefix}{key}": ref for prefix, part in parts.items() for key, ref in _tensors(part).items()}
    kept = adapter.metadata.get("safetensors", {}) if adapter.format == NAME else {}
    metadata = {"format": "pt", **kept, METADATA: json.dumps(said, indent=2, sort_keys=True)}
    return Container(tensors, metadata, name="pytorch_lora_weights.safetensors")


def _place(name: str, grouped: bool) -> tuple[str, str]:
    """(the part's prefix, the tensor's name within it); the prefix of a lone model is empty."""
    if name.startswith(_SINGLE_FILE):
        remedy = "give the pipeline it belongs to with --base, or --format comfyui or kohya"
        raise NotExpressible("a name of a single-file checkpoint's layout, which diffusers' models do not have", remedy=remedy)
    first, _, rest = name.partition(".")
    if not grouped:
        return "", name
    if first not in PARTS:
        raise NotExpressible("lies in no part of a pipeline, and other tensors do", expected=", ".join(PARTS), remedy=KEPT)
    return f"{first}.", rest


def _take(part: _Part, name: str, delta: Delta) -> None:
    module, _, leaf = name.rpartition(".")
    low = delta.direction if isinstance(delta, DoRA) else delta
    if module and leaf == "bias" and isinstance(delta, Full):
        part.biases[module] = delta
        return
    if not module or leaf != "weight" or not isinstance(low, LowRank):
        raise NotExpressible(f"diffusers cannot say {delta.called} delta", remedy="convert it first: --kind lora")
    if low.layer in ("embedding", "transposed"):
        fact = f"a LoRA of a weight that lies as {low.layer} ones do, of which diffusers' models have none"
        raise NotExpressible(fact, remedy="--format loratools keeps it")
    part.lows[module] = low
    if isinstance(delta, DoRA):
        if delta.axis != "out":
            raise NotExpressible("diffusers has DoRA along the outputs only", remedy="convert --magnitude-axis out --base")
        part.magnitudes[module] = delta.magnitude


def _mixed(prefix: str, part: _Part) -> list[LoratoolsError]:
    """What one config for a whole part cannot say of some of its modules."""
    doras, plain = ([f"{prefix}{name}.weight" for name in part.lows if (name in part.magnitudes) is which] for which in (True, False))
    faults: list[LoratoolsError] = [*mixed(doras, plain, "use_dora holds for a whole part")]
    bare = [module for module in part.lows if module not in part.biases]
    if part.biases and bare:
        fact = "lora_bias holds for a whole part, and this module has none"
        faults.append(NotExpressible(fact, tensor=f"{prefix}{bare[0]}.bias", remedy=KEPT))
    if part.biases and part.magnitudes:
        first = f"{prefix}{next(iter(part.biases))}.bias"
        faults.append(NotExpressible("peft allows no lora_bias beside DoRA", tensor=first, remedy=KEPT))
    for module, bias in part.biases.items():
        if module not in part.lows or bias.scale != part.lows[module].scaling:
            fact = "a bias difference needs a LoRA of the same scaling on its module"
            faults.append(NotExpressible(fact, tensor=f"{prefix}{module}.bias", remedy=KEPT))
    return faults


def _config(part: _Part) -> dict[str, Any]:
    rslora = all(low.rslora for low in part.lows.values())
    ranks = {module: low.rank for module, low in part.lows.items()}
    alphas = {module: _whole(low.alpha if rslora else alpha_of(low)) for module, low in part.lows.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "use_dora": bool(part.magnitudes), "lora_bias": bool(part.biases),
        "target_modules": sorted(part.lows), "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True,
        "rank_pattern": _patterns(ranks, rank), "alpha_pattern": _patterns(alphas, alpha),
    }  # fmt: skip


def _whole(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _commonest(values: Iterable[Any]) -> Any:
    counted = Counter(values).most_common()
    return min(value for value, count in counted if count == counted[0][1])


def _patterns(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    return {f"^{re.escape(module)}": value for module, value in sorted(values.items()) if value != usual}


def _tensors(part: _Part) -> dict[str, Ref]:
    tensors: dict[str, Ref] = {}
    for module, low in part.lows.items():
        ones = (1,) * (len(low.A.spec.shape) - 2)
        tensors |= {f"{module}.lora_A.weight": low.A, f"{module}.lora_B.weight": low.B.reshape(*low.B.spec.shape, *ones)}
        if module in part.magnitudes:
            size = part.magnitudes[module].spec.numel
            shape = (1, size, *ones) if ones else (size,)
            tensors[f"{module}.lora_magnitude_vector"] = part.magnitudes[module].reshape(*shape)
        if module in part.biases:
            tensors[f"{module}.lora_B.bias"] = part.biases[module].diff
    return tensors
