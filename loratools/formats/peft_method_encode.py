"""Writing one of peft's other methods by its row: the config's common fields, tensors saved whole, and what no method can say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement
from loratools.deltas.laid import Turned, TurnedAdditive, Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats import peft_targets
from loratools.formats.base import Container
from loratools.formats.peft_keys import ROOT, SAVED
from loratools.formats.peft_method import Method
from loratools.formats.peft_methods import METHODS
from loratools.formats.peft_writing import WRITTEN_FOR, Writing, saved
from loratools.refs import Ref

_REMEDY = "convert it first: --kind lora, or --format loratools keeps it"


def row_for(adapter: Adapter) -> Method | None:
    """The row that says the adapter's first change that is not LoRA; None where there is any LoRA, or no row writes it."""
    if any(isinstance(_direction(_bare(delta)), LowRank) for delta in adapter.values()):
        return None
    weights = [_bare(delta) for name, delta in adapter.items() if name.endswith(".weight")]
    rows = [row for row in METHODS.values() if row.writing is not None]
    return next((row for delta in weights for row in rows if row.writing and isinstance(delta, row.writing.kinds)), None)


def _direction(delta: Delta) -> Delta:
    return delta.direction if isinstance(delta, DoRA) else delta


def _bare(delta: Delta) -> Delta:
    """A delta as its file tells it: without what it comes after, or how the weight lies."""
    if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
        return _bare(delta.then)
    return delta.delta if isinstance(delta, Unsettled | WherePresent | Turned | TurnedAdditive) else delta


def encode_method(adapter: Adapter, row: Method) -> Container:
    """The adapter as a method's config and tensors, which keep their bytes. Raises NotExpressible, all faults together."""
    assert row.writing is not None
    faults: list[LoratoolsError] = [NotExpressible("peft has no place for it", tensor=name) for name in adapter.passengers]
    whole: dict[str, Ref] = {}
    modules: dict[str, dict[str, Delta]] = {}
    for name, delta in adapter.items():
        if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
            whole[name], delta = delta.first.value, delta.then
        if isinstance(delta, Replacement):
            whole[name] = delta.value
            continue
        fault = _fault(name, delta, row, row.writing)
        faults += [fault] if fault else []
        path, _, leaf = name.rpartition(".")
        modules.setdefault(path, {})[leaf] = _bare(delta)
    raise_all(faults)
    stated = dict(adapter.metadata.get("peft", {}))
    own = stated if stated.get("peft_type") == row.peft_type else {}
    written = row.writing.write(modules, own)
    tensors, named, loose = saved(whole, modules)
    config = _common(stated, own, row) | dict(written.settings)
    config |= {"target_modules": sorted(modules), "modules_to_save": named or None}
    if any(isinstance(delta, Turned | TurnedAdditive) for delta in adapter.values()):
        config["fan_in_fan_out"] = True
    if loose and row.own_biases is None:
        fact = f"peft's {row.peft_type} saves no biases"
        raise_all([NotExpressible(fact, tensor=name, remedy="--format loratools keeps it") for name in loose])
    if row.own_biases is not None:
        within = all(name.removesuffix(".bias") in modules for name in loose)
        config["bias"] = "none" if not loose else row.own_biases if within else "all"
    metadata = dict(adapter.metadata.get("safetensors", {})) | {"format": "pt"}
    metadata.pop(SAVED, None)
    under = {ROOT + key: ref for key, ref in written.tensors.items()}
    return Container(under | tensors, metadata | ({SAVED: json.dumps(sorted(whole))} if whole else {}), dict(sorted(config.items())))


def _fault(name: str, delta: Delta, row: Method, writing: Writing) -> LoratoolsError | None:
    bare = _bare(delta)
    if isinstance(bare, writing.kinds):
        lies = isinstance(delta, Turned | TurnedAdditive) or (isinstance(delta, Unsettled) and delta.transposed)
        if lies and not row.conv1d:
            return NotExpressible(f"peft puts {row.peft_type} on no weight that is stored transposed", tensor=name, remedy=_REMEDY)
        return None
    what = f"{bare.called} delta" + (f" ({_direction(bare).called})" if _direction(bare) is not bare else "")
    return NotExpressible(f"peft's {row.peft_type} cannot say {what}", tensor=name, remedy=_REMEDY)


def _common(stated: Mapping[str, Any], own: Mapping[str, Any], row: Method) -> dict[str, Any]:
    """The fields that every method's config has, and of one that was of this method those that mattered in training."""
    kept = (*peft_targets.TRAINING, "task_type", "exclude_modules", *(row.training if own else ()))
    carried = {name: value for name, value in stated.items() if name in kept}
    common: dict[str, Any] = {"base_model_name_or_path": None, "task_type": None, "inference_mode": True, "revision": None}
    return {**common, "peft_version": WRITTEN_FOR, **carried, "peft_type": row.peft_type}
