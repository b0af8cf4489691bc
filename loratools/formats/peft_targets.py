"""What every config of peft's says of the modules it concerns: those targeted, those saved whole, those whose biases are saved.

Read from peft 0.21.2 (`tuners/tuners_utils.py::check_target_module_exists`, `utils/other.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import FormatError
from loratools.families import of_head
from loratools.formats.peft_values import Values, short

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# fields that every method may have: read here, and those that matter while training or loading
USED = (
    "peft_type", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias", "task_type",
    "fan_in_fan_out",
)  # fmt: skip
TRAINING = (
    "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "runtime_config",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The modules a config names, by peft's own rules."""

    target: Any
    exclude: Any
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    saved: tuple[str, ...]
    bias: str
    carried: Mapping[str, Any]
    tying: bool = False
    tensor: str = "weight"
    lora_bias: bool = False
    parameters: tuple[str, ...] = ()

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` (or the task's own head) covers a module, by peft's rule: a path that ends with an entry."""
        parts = module.split(".")
        return any(".".join(parts[:count]).endswith(entry) for entry in self.saved for count in range(1, len(parts) + 1))

    def names(self, module: str) -> bool:
        """Whether `target_modules` has this very module in its list."""
        return isinstance(self.target, tuple) and module in self.target and self.targets(module)

    def targets(self, module: str) -> bool:
        """Whether peft would adapt a module; None targets leave it open."""
        if self.target is None or self.target == "all-linear":
            return True
        if self.exclude and selected(self.exclude, module):
            return False
        if any(re.match(rf"(^|.*\.){re.escape(entry)}($|\..*)", module) for entry in self.saved):
            return False
        return selected(self.target, module) and self._layer_chosen(module)

    def ties(self, module: str) -> bool:
        """Whether peft would tie this head's LoRA to the embedding's (`ensure_weight_tying`), listed as a target or not."""
        return self.tying and of_head(f"{module}.weight")

    def parameter(self, name: str) -> bool:
        """Whether `target_parameters` has a tensor's name, or an ending of it."""
        return selected(self.parameters, name)

    def _layer_chosen(self, module: str) -> bool:
        if not self.layers or isinstance(self.target, str) or module in self.target:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found.group(1)) in self.layers


def selected(target: Any, module: str) -> bool:
    if isinstance(target, str):
        return re.fullmatch(target, module) is not None
    return any(module == entry or module.endswith("." + entry) for entry in target)


def dotted_key(patterns: Iterable[str], module: str) -> str:
    """As `pattern_key`, by the older rule of some methods: a pattern fits what stands behind a dot, or the whole name literally.

    >>> dotted_key(["k_proj", "q_.*"], "self_attn.q_proj"), dotted_key(["q_proj"], "q_proj"), dotted_key(["q_.*"], "q_proj")
    ('q_.*', 'q_proj', 'q_proj')
    """
    return next((pattern for pattern in patterns if re.match(rf".*\.{pattern}$", module)), module)


def targets_of(values: Values, *, own_biases: str | None, carried: Iterable[str]) -> dict[str, Any]:
    """The fields of `Targets` from a config; `own_biases` is the method's word for the biases of the modules it adapts, if any."""
    config = values.config
    saved = values.names("modules_to_save")
    saved += tuple(head for head in HEADS.get(str(config.get("task_type")), ()) if head not in saved)
    bias = config.get("bias") or "none"
    own = own_biases is not None and str(bias).lower() == own_biases  # peft looks for `_only` alone, and spells MiSS_only in its help
    if bias not in ("none", "all") and not own:
        known = ["none", "all", *([own_biases] if own_biases else [])]
        values.faults.append(FormatError("bias", found=short(bias), expected=" or ".join(known)))
    return {
        "target": values.target("target_modules"),
        "exclude": values.target("exclude_modules"),
        "layers": values.layers("layers_to_transform"),
        "layers_pattern": tuple(name for name in values.names("layers_pattern") if values.compiles("layers_pattern", name)),
        "saved": saved,
        "bias": "own" if own else bias,
        "carried": {name: value for name, value in config.items() if name in carried},
    }
