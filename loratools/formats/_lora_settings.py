"""What the fields of peft's LoraConfig do to the trained tensors' meaning, where it lies beside them or in diffusers' metadata.

Read from peft 0.21.2 (`tuners/lora/config.py`, `config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.errors import LoratoolsError, UnsupportedError

# matter while training or loading, not to what the trained tensors mean
TRAINING = (
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "megatron_config", "megatron_core",
    "eva_config", "runtime_config", "loftq_config", "corda_config", "lora_ga_config", "inference_only",
)  # fmt: skip
# change what the tensors mean; refused unless null, false or empty
REFUSED = {
    "alora_invocation_tokens": "acts only after its invocation tokens (aLoRA): no weight edit",
    "arrow_config": "routes between several adapters by their input (Arrow): no weight edit",
    "layer_replication": "repeats layers, so one base weight would need several values",
}
# initialisations that leave the base as it was
INITS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
# say which modules were trained, or of tensors that would be there
_SELECTING = (
    "peft_type", "fan_in_fan_out", "lora_bias", "bias", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "task_type", "ensure_weight_tying", "peft_version", "qalora_group_size",
)  # fmt: skip


def given(value: Any) -> bool:
    """Whether a field says something: it is not null, false or empty; 0 is a value."""
    return value is not None and value is not False and value not in ("", [], {}, ())


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def refused(settings: Mapping[str, Any]) -> list[LoratoolsError]:
    """The settings that peft does not scale, but reads the tensors by in another way: no plain LoRA or DoRA of their rank and alpha."""
    faults: list[LoratoolsError] = []
    for name, value in settings.items():
        if name == "init_lora_weights" and (value.lower() if isinstance(value, str) else value) not in INITS:
            fact = f"{name} may have changed the base before training"
            remedy = "save the adapter with path_initial_model_for_weight_conversion"
            faults.append(UnsupportedError(fact, found=short(value), remedy=remedy))
        elif name not in (*TRAINING, *_SELECTING, "init_lora_weights") and given(value):
            why = REFUSED.get(name, "a setting that may change what the tensors mean, and is read of peft's folders alone")
            faults.append(UnsupportedError(f"{name}: {why}", found=short(value)))
    return faults
