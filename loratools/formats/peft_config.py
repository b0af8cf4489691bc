"""The fields of peft's LoraConfig: what each means to the arithmetic, checked before a tensor is read.

Read from peft 0.21.2 (`tuners/lora/config.py`, `config.py`). A field this table lacks may change the arithmetic in ways it
cannot guess, so unless it is null, false or empty it is an error, never a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.deltas.experts import PACKINGS
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, UnsupportedError, raise_all
from loratools.formats.peft_targets import Targets, pattern_key, targets_of
from loratools.formats.peft_values import Values, given, short, unknown

# read by the codec
USED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "bias",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "init_lora_weights",
    "ensure_weight_tying", "target_parameters", "lora_B_layout", "peft_version",
)  # fmt: skip
# matter while training or loading, not to what the trained tensors mean
TRAINING = (
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "qalora_group_size",
    "megatron_config", "megatron_core", "eva_config", "runtime_config", "velora_config", "monteclora_config",
    "loftq_config", "corda_config", "lora_ga_config", "inference_only",
)  # fmt: skip
CARRIED = (*TRAINING, "task_type", "fan_in_fan_out", "ensure_weight_tying", "peft_version")
# change what the tensors mean; refused unless null, false or empty
REFUSED = {
    "use_qalora": "pools its input (QALoRA)",
    "use_bdlora": "stores block-diagonal factors (BD-LoRA)",
    "alora_invocation_tokens": "acts only after its invocation tokens (aLoRA): no weight edit",
    "arrow_config": "routes between several adapters by their input (Arrow): no weight edit",
    "kasa_config": "truncates the base's singular values (KaSA)",
    "layer_replication": "repeats layers, so one base weight would need several values",
    "trainable_token_indices": "replaces single rows of an embedding",
    "enable_lora": "adapts slices of fused matrices (peft 0.1 and 0.2)",
}
# initialisations that leave the base as it was
INITS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")

@dataclass(frozen=True, kw_only=True)
class LoraConfig(Targets):
    """The settings that give a LoRA's tensors their meaning."""

    r: int | None
    alpha: float
    rslora: bool
    dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    packing: str | None = None
    version: str | None = None

    def rank(self, module: str) -> int | None:
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.r)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)


def parse(config: Mapping[str, Any], *, alpha: float | None = None) -> LoraConfig:
    """The config checked field by field; every fault is collected.

    Raises UnsupportedError for settings that change the arithmetic, FormatError for values that are no settings,
    AmbiguousError when lora_alpha is missing and `alpha` does not give it.
    """
    faults: list[LoratoolsError] = []
    faults += [unknown(name) for name, value in config.items() if name not in USED + TRAINING and name not in REFUSED and given(value)]
    faults += [UnsupportedError(f"{name}: {why}", found=short(config[name])) for name, why in REFUSED.items() if given(config.get(name))]
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        remedy = "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA of the original base"
        faults.append(UnsupportedError("init_lora_weights changed the base before training", found=init, remedy=remedy))
    values = Values(config, faults)
    stated = values.number("lora_alpha")
    if config.get("lora_alpha") is None and alpha is None:
        faults.append(AmbiguousError("lora_alpha is missing, and nothing else tells the scale", remedy="give it with --alpha-in A"))
    result = LoraConfig(
        r=values.rank("r"),
        alpha=alpha if alpha is not None else stated or 0.0,
        rslora=values.flag("use_rslora"),
        dora=values.flag("use_dora"),
        rank_pattern=values.patterns("rank_pattern", whole=True),
        alpha_pattern=values.patterns("alpha_pattern", whole=False),
        lora_bias=values.flag("lora_bias"),
        tying=values.flag("ensure_weight_tying"),
        **_parameters(values),
        **_targets(values),
    )
    if result.dora and result.lora_bias:
        faults.append(FormatError("use_dora and lora_bias exclude each other"))
    if result.parameters:
        # peft's ParamWrapper takes none of these
        excluded = ("use_dora", "lora_bias", "fan_in_fan_out")
        faults += [FormatError(f"target_parameters and {name} exclude each other") for name in excluded if given(config.get(name))]
    raise_all(faults)
    return result


def _targets(values: Values) -> dict[str, Any]:
    found = targets_of(values, own_biases="lora_only", carried=CARRIED)
    if found["target"] is None and given(values.config.get("target_parameters")):
        found["target"] = ()  # peft then adapts these parameters and no modules
    return found


def _parameters(values: Values) -> dict[str, Any]:
    """The settings of LoRA on bare parameters."""
    packing, version = values.config.get("lora_B_layout"), values.config.get("peft_version")
    if packing not in (None, *PACKINGS):
        values.fault("lora_B_layout", " or ".join(PACKINGS))
    if version is not None and not isinstance(version, str):
        values.fault("peft_version", "a version")
    if isinstance(values.config.get("target_parameters"), str):  # peft takes no regular expression here
        values.fault("target_parameters", "a list of names")
        return {}
    return {"parameters": values.names("target_parameters"), "packing": packing, "version": version}
