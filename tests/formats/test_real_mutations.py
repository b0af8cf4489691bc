"""Published adapters, each tensor and each setting of theirs changed: an error, or another meaning where the format says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratools.adapter import Adapter
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError
from loratools.formats import FORMATS
from loratools.formats.base import Container, ReadOptions
from loratools.formats.opening import open_container
from loratools.formats.peft_config import TRAINING
from loratools.refs import Ref, Spec

DATA = Path(__file__).parent.parent / "data"
REAL = {
    "peft_clip_text_encoder": ReadOptions(), "peft_convnext": ReadOptions(), "loralib/roberta_base_lora_mnli.bin": ReadOptions(alpha=16),
}  # fmt: skip
Tensors = Mapping[str, Ref]
CHANGES: dict[str, Callable[[Tensors, str], Tensors]] = {
    "deleted": lambda tensors, key: {name: ref for name, ref in tensors.items() if name != key},
    "renamed": lambda tensors, key: {f"{name}x" if name == key else name: ref for name, ref in tensors.items()},
    "moved": lambda tensors, key: {f"stray.{name}" if name == key else name: ref for name, ref in tensors.items()},
    "with a stray": lambda tensors, key: {**tensors, f"{key}.more": tensors[key]},
    "one row more": lambda tensors, key: {**tensors, key: _taller(tensors[key])},
}


def _taller(ref: Ref) -> Ref:
    """The same tensor to a header's reader, of one row more: no data is read here."""
    return ref.reshape(ref.spec.shape[0] + 1, *ref.spec.shape[1:])


def read(container: Container, options: ReadOptions, base: Mapping[str, Spec]) -> Adapter | str:
    """The adapter under the base's names, or the error that a person gets."""
    try:
        (row,) = [row for row in FORMATS if row.detect(container)] or [FORMATS[0]]
        return row.decode(container, options).resolve(base)
    except LoratoolsError as error:
        return str(error)


def opened(name: str) -> tuple[Container, dict[str, Spec]]:
    """A published file, and the specs of a base it fits."""
    container = open_container(DATA / name)
    (row,) = [row for row in FORMATS if row.detect(container)]
    adapter = row.decode(container, REAL[name])
    shapes = {key: delta.shape() if isinstance(delta, LowRank) else delta.spec(None).shape for key, delta in adapter.items()}
    base = {key: Spec("F32", shape) for key, shape in shapes.items()}
    biases = {key.replace(".weight", ".bias"): Spec("F32", spec.shape[:1]) for key, spec in base.items()}
    return container, {**biases, **base, "head.weight": Spec("F32", (3, 4)), "model.score.weight": Spec("F32", (2, 4))}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", REAL)
def test_every_change_of_a_tensor_is_an_error(name: str, change: str) -> None:
    container, base = opened(name)
    assert isinstance(read(container, REAL[name], base), Adapter)
    # a state dict of loralib's does not say which heads it should hold, or how large they are
    spared = {key for key in container.tensors if "lora_" not in key and change in ("deleted", "moved", "one row more")}
    silent = [
        key
        for key in container.tensors
        if isinstance(read(replace(container, tensors=CHANGES[change](container.tensors, key)), REAL[name], base), Adapter)
    ]
    assert set(silent) - spared == set()


OTHERS: dict[str, Any] = {
    "r": 4, "lora_alpha": 3, "use_rslora": True, "use_dora": True, "lora_bias": True, "bias": "lora_only", "peft_type": "LOHA",
    "modules_to_save": ["head"], "target_modules": ["nothing"], "rank_pattern": {".*": 4}, "alpha_pattern": {".*": 3},
    "init_lora_weights": "pissa", "exclude_modules": ".*", "layers_to_transform": [0], "task_type": "SEQ_CLS",
}  # fmt: skip
# what concerns other weights than these: a square's orientation, patterns for layers that are not chosen, tied heads, stacks of experts,
# pooled inputs
SILENT = ("fan_in_fan_out", "layers_pattern", "ensure_weight_tying", "peft_version", "qalora_group_size")


@pytest.mark.parametrize("name", [name for name in REAL if name.startswith("peft")])
def test_every_change_of_a_setting_is_an_error_or_another_scale(name: str) -> None:
    container, base = opened(name)
    before = read(container, REAL[name], base)
    assert isinstance(before, Adapter) and container.config is not None
    for field in container.config:
        value = OTHERS.get(field, "anything")
        after = read(replace(container, config={**container.config, field: value}), REAL[name], base)
        if isinstance(after, str) or field in TRAINING or field in SILENT:
            continue
        said, was = ([(key, delta.kind, delta.facts()) for key, delta in adapter.items()] for adapter in (after, before))
        assert said != was, field
