"""The fields of peft's LoraConfig: what each means to the arithmetic, checked before a tensor is read.

Read from peft 0.21.2 (`tuners/lora/config.py`, `config.py`). A field this table lacks may change the arithmetic in ways it
cannot guess, so unless it is null, false or empty it is an error, never a plain LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import AmbiguousError, FormatError, LoratoolsError, UnsupportedError, raise_all
from loratools.families import of_head

# read by the codec
USED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "bias",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "init_lora_weights",
    "ensure_weight_tying",
)  # fmt: skip
# matter while training or loading, not to what the trained tensors mean
TRAINING = (
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version", "qalora_group_size",
    "megatron_config", "megatron_core", "eva_config", "runtime_config", "velora_config", "monteclora_config",
    "loftq_config", "corda_config", "lora_ga_config", "inference_only",
)  # fmt: skip
CARRIED = (*TRAINING, "task_type", "fan_in_fan_out", "ensure_weight_tying")
# change what the tensors mean; refused unless null, false or empty
REFUSED = {
    "use_qalora": "pools its input (QALoRA)",
    "use_bdlora": "stores block-diagonal factors (BD-LoRA)",
    "alora_invocation_tokens": "acts only after its invocation tokens (aLoRA): no weight edit",
    "arrow_config": "routes between several adapters by their input (Arrow): no weight edit",
    "kasa_config": "truncates the base's singular values (KaSA)",
    "layer_replication": "repeats layers, so one base weight would need several values",
    "target_parameters": "targets parameters such as fused experts",
    "trainable_token_indices": "replaces single rows of an embedding",
    "enable_lora": "adapts slices of fused matrices (peft 0.1 and 0.2)",
}
# initialisations that leave the base as it was
INITS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class LoraConfig:
    """The settings that give a LoRA's tensors their meaning."""

    r: int | None
    alpha: float
    rslora: bool
    dora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    lora_bias: bool
    bias: str
    saved: tuple[str, ...]
    target: Any
    exclude: Any
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    tying: bool
    carried: Mapping[str, Any]

    def rank(self, module: str) -> int | None:
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.r)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` (or the task's own head) covers a module, by peft's rule: a path that ends with an entry."""
        parts = module.split(".")
        return any(".".join(parts[:count]).endswith(entry) for entry in self.saved for count in range(1, len(parts) + 1))

    def names(self, module: str) -> bool:
        """Whether `target_modules` has this very module in its list."""
        return isinstance(self.target, tuple) and module in self.target and self.targets(module)

    def targets(self, module: str) -> bool:
        """Whether peft would put a LoRA on a module (`tuners_utils.check_target_module_exists`); None targets leave it open."""
        if self.target is None or self.target == "all-linear":
            return True
        if self.exclude and _selected(self.exclude, module):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", module) for entry in self.saved):
            return False
        return _selected(self.target, module) and self._layer_chosen(module)

    def ties(self, module: str) -> bool:
        """Whether peft would tie this head's LoRA to the embedding's (`ensure_weight_tying`), listed as a target or not."""
        return self.tying and of_head(f"{module}.weight")

    def _layer_chosen(self, module: str) -> bool:
        if not self.layers or isinstance(self.target, str) or module in self.target:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found.group(1)) in self.layers


def _selected(target: Any, module: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == entry or module.endswith("." + entry) for entry in target)


def pattern_key(patterns: Iterable[str], module: str) -> str:
    """The first pattern, in the file's order, that fits a module; the module's own name if none (`utils.get_pattern_key`).

    >>> pattern_key(["k_proj", "layers.0.*_proj"], "model.layers.0.self_attn.q_proj")
    'layers.0.*_proj'
    """
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", module)), module)


def parse(config: Mapping[str, Any], *, alpha: float | None = None) -> LoraConfig:
    """The config checked field by field; every fault is collected.

    Raises UnsupportedError for settings that change the arithmetic, FormatError for values that are no settings,
    AmbiguousError when lora_alpha is missing and `alpha` does not give it.
    """
    faults: list[LoratoolsError] = []
    faults += [_unknown(name) for name, value in config.items() if name not in USED + TRAINING and name not in REFUSED and _set(value)]
    faults += [UnsupportedError(f"{name}: {why}", found=_short(config[name])) for name, why in REFUSED.items() if _set(config.get(name))]
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in INITS:
        remedy = "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA of the original base"
        faults.append(UnsupportedError("init_lora_weights changed the base before training", found=init, remedy=remedy))
    values = _Values(config, faults)
    stated = values.number("lora_alpha")
    if config.get("lora_alpha") is None and alpha is None:
        faults.append(AmbiguousError("lora_alpha is missing, and nothing else tells the scale", remedy="give it with --alpha-in A"))
    saved = values.names("modules_to_save")
    saved += tuple(head for head in HEADS.get(str(config.get("task_type")), ()) if head not in saved)
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        faults.append(FormatError("bias", found=_short(bias), expected="none, all or lora_only"))
    result = LoraConfig(
        r=values.rank("r"),
        alpha=alpha if alpha is not None else stated or 0.0,
        rslora=values.flag("use_rslora"),
        dora=values.flag("use_dora"),
        rank_pattern=values.patterns("rank_pattern", whole=True),
        alpha_pattern=values.patterns("alpha_pattern", whole=False),
        lora_bias=values.flag("lora_bias"),
        bias=bias,
        saved=saved,
        target=values.target("target_modules"),
        exclude=values.target("exclude_modules"),
        layers=values.layers("layers_to_transform"),
        layers_pattern=tuple(name for name in values.names("layers_pattern") if values.compiles("layers_pattern", name)),
        tying=values.flag("ensure_weight_tying"),
        carried={name: value for name, value in config.items() if name in CARRIED},
    )
    if result.dora and result.lora_bias:
        faults.append(FormatError("use_dora and lora_bias exclude each other"))
    raise_all(faults)
    return result


def _set(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {}, ())  # 0 is a value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _unknown(name: str) -> UnsupportedError:
    remedy = "if it only matters in training, set it to null in adapter_config.json"
    return UnsupportedError(f"adapter_config.json sets {name}, which this version does not know", remedy=remedy)


@dataclass(frozen=True)
class _Values:
    """Typed reading of a config, faults gathered."""

    config: Mapping[str, Any]
    faults: list[LoratoolsError]

    def _fault(self, name: str, expected: str) -> None:
        self.faults.append(FormatError(f"adapter_config.json: {name}", found=_short(self.config.get(name)), expected=expected))

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            self._fault(name, "true or false")
        return value is True

    def number(self, name: str) -> float | None:
        value = self.config.get(name)
        if value is None:
            return None
        if not _finite(value):
            self._fault(name, "a number")
            return None
        return float(value)

    def rank(self, name: str) -> int | None:
        value = self.config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            self._fault(name, "a whole number of at least 1")
            return None
        return value

    def patterns(self, name: str, *, whole: bool) -> dict[str, Any]:
        value = self.config.get(name)
        if value is None:
            return {}
        good = isinstance(value, dict) and all((type(v) is int and v > 0) if whole else _finite(v) for v in value.values())
        if not good:
            self._fault(name, "regular expressions mapped to " + ("ranks" if whole else "numbers"))
            return {}
        return {pattern: number for pattern, number in value.items() if self.compiles(name, pattern)}

    def compiles(self, name: str, pattern: str) -> bool:
        try:
            re.compile(f"({pattern})")  # as it will be used: flags for the whole have no place in it
        except re.error as error:
            self.faults.append(FormatError(f"adapter_config.json: {name}: not a regular expression ({error})", found=pattern))
            return False
        return True

    def names(self, name: str) -> tuple[str, ...]:
        value = self.config.get(name)
        value = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            self._fault(name, "a list of names")
            return ()
        return tuple(value or ())

    def target(self, name: str) -> Any:
        value = self.config.get(name)
        if isinstance(value, str):
            return value if self.compiles(name, value) else None
        return self.names(name) or None

    def layers(self, name: str) -> tuple[int, ...] | None:
        value = self.config.get(name)
        value = [value] if type(value) is int else value
        if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
            self._fault(name, "layer numbers")
            return None
        return None if value is None else tuple(value)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
