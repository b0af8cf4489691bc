"""Writing one of peft's other methods by its row: the config's common fields, tensors saved whole, and what no method can say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.experts import Experts
from loratools.deltas.full import Replacement
from loratools.deltas.kasa import KaSA
from loratools.deltas.laid import Turned, TurnedAdditive, Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import OnParameter
from loratools.deltas.residual import Residual
from loratools.deltas.rows import Rows
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats import peft_targets
from loratools.formats._refused import passengers
from loratools.formats.base import Container
from loratools.formats.peft_keys import ROOT, SAVED
from loratools.formats.peft_method import Method
from loratools.formats.peft_methods import METHODS
from loratools.formats.peft_writing import REMEDY, WRITTEN_FOR, Modules, Writing, saved
from loratools.refs import Ref

_BANK = "base_model."
_OF_LORA = (LowRank, KaSA, Residual, Experts, OnParameter)  # what LoRA's own config says


def row_for(adapter: Adapter) -> Method | None:
    """The row that says the adapter's changes that are no LoRA and no tensors saved whole; None where there is any LoRA, or no row does.

    The method that the adapter's file was of goes before others that say the same.
    """
    if any(isinstance(_direction(_bare(delta)), _OF_LORA) for delta in adapter.values()):
        return None
    told = adapter.metadata.get("peft", {}).get("peft_type")
    rows = sorted((row for row in METHODS.values() if row.writing is not None), key=lambda row: row.peft_type != told)
    changes = [(name.rpartition(".")[2], _bare(delta)) for name, delta in adapter.items()]
    own = [(leaf, delta) for leaf, delta in changes if not isinstance(delta, Replacement)] or changes
    tokens = [delta.indices for _, delta in changes if isinstance(delta, Rows)]
    if tokens and (told != "TRAINABLE_TOKENS" or len(tokens) < len(adapter) or len(set(tokens)) > 1):
        return None  # LoRA's config says trained tokens alone, several lists of them, and modules saved beside
    return next((row for leaf, delta in own for row in rows if row.writing and row.writing.takes(leaf, delta)), None)


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
    modules, whole = _apart(adapter, row, row.writing)
    stated = dict(adapter.metadata.get("peft", {}))
    own = stated if stated.get("peft_type") == row.peft_type else {}
    written = row.writing.write(modules, own)
    tensors, named, loose = saved(whole, modules)
    config = _common(stated, own, row) | dict(written.settings)
    config |= {"target_modules": sorted(modules if written.targets is None else written.targets)}
    config |= {"modules_to_save": named} if named else {}
    if any(isinstance(delta, Turned | TurnedAdditive) or _lies(delta) for delta in adapter.values()):
        config["fan_in_fan_out"] = True
    if loose and row.own_biases is None:
        fact = f"peft's {row.peft_type} saves no biases"
        raise_all([NotExpressible(fact, tensor=name, remedy="--format loratools keeps it") for name in loose])
    if row.own_biases is not None:
        within = all(name.removesuffix(".bias") in modules for name in loose)
        config["bias"] = "none" if not loose else row.own_biases if within else "all"
    metadata = dict(adapter.metadata.get("safetensors", {})) | {"format": "pt"}
    metadata.pop(SAVED, None)
    under = {ROOT + key: ref for key, ref in written.tensors.items()} | {_BANK + key: ref for key, ref in written.shared.items()}
    return Container(under | tensors, metadata | ({SAVED: json.dumps(sorted(whole))} if whole else {}), dict(sorted(config.items())))


def _apart(adapter: Adapter, row: Method, writing: Writing) -> tuple[Modules, dict[str, Ref]]:
    """The changes that are the method's, by module, and the tensors saved whole; every fault is collected."""
    faults = passengers(adapter, "peft has")
    whole: dict[str, Ref] = {}
    modules: dict[str, dict[str, Delta]] = {}
    for name, delta in adapter.items():
        path, _, leaf = name.rpartition(".")
        if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
            whole[name], delta = delta.first.value, delta.then
        if isinstance(delta, Replacement) and not writing.takes(leaf, delta):
            whole[name] = delta.value
            continue
        fault = _fault(name, leaf, delta, row, writing)
        faults += [fault] if fault else []
        modules.setdefault(path, {})[leaf] = _bare(delta)
    raise_all(faults)
    return modules, whole


def _lies(delta: Delta) -> bool:
    """Whether a change is known to be of a weight that lies transposed, in its own parts."""
    times = getattr(_bare(delta), "times", None)
    return (isinstance(times, LowRank) and times.layer == "transposed") or (isinstance(delta, Unsettled) and delta.transposed is True)


def _fault(name: str, leaf: str, delta: Delta, row: Method, writing: Writing) -> LoratoolsError | None:
    bare = _bare(delta)
    if writing.takes(leaf, bare):
        lies = isinstance(delta, Turned | TurnedAdditive) or _lies(delta)
        if lies and not row.conv1d:
            return NotExpressible(f"peft puts {row.peft_type} on no weight that is stored transposed", tensor=name, remedy=REMEDY)
        return None
    what = f"{bare.called} delta" + (f" ({_direction(bare).called})" if _direction(bare) is not bare else "")
    return NotExpressible(f"peft's {row.peft_type} cannot say {what}", tensor=name, remedy=REMEDY)


def _common(stated: Mapping[str, Any], own: Mapping[str, Any], row: Method) -> dict[str, Any]:
    """The fields that every method's config has, and of one that was of this method those that mattered in training."""
    kept = (*peft_targets.TRAINING, "task_type", *((*row.training, "fan_in_fan_out", "exclude_modules") if own else ()))
    carried = {name: value for name, value in stated.items() if name in kept}
    common: dict[str, Any] = {"base_model_name_or_path": None, "task_type": None, "inference_mode": True, "revision": None}
    return {**common, "peft_version": WRITTEN_FOR, **carried, "peft_type": row.peft_type}
