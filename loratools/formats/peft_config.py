"""The fields of peft's LoraConfig: what each means to the arithmetic, checked before a tensor is read.

Read from peft 0.21.2 (`tuners/lora/config.py`, `config.py`). A field this table lacks may change the arithmetic in ways it
cannot guess, so unless it is null, false or empty it is an error, never a plain LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.deltas.experts import PACKINGS
from loratools.errors import AmbiguousError, FormatError, LoratoolsError, UnsupportedError, raise_all
from loratools.formats._lora_settings import INITS as INITS
from loratools.formats._lora_settings import REFUSED as REFUSED
from loratools.formats._lora_settings import TRAINING as TRAINING
from loratools.formats._lora_settings import given, short
from loratools.formats._patterns import pattern_key
from loratools.formats.peft_targets import Targets, targets_of
from loratools.formats.peft_tokens import Tokens, tokens_of
from loratools.formats.peft_values import Values, unknown
from loratools.formats.peft_variants import Variant, variant_of

# read by the codec
USED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "bias",
    "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "init_lora_weights",
    "ensure_weight_tying", "target_parameters", "lora_B_layout", "peft_version", "use_qalora", "qalora_group_size", "use_bdlora",
    "kasa_config", "velora_config", "monteclora_config", "enable_lora", "merge_weights", "trainable_token_indices",
)  # fmt: skip
CARRIED = (*TRAINING, "task_type", "fan_in_fan_out", "ensure_weight_tying", "peft_version", "init_lora_weights")
# read by the codec, and of use to the one that writes it again
_KEPT = (*CARRIED, "kasa_config", "target_parameters")
# initialisations that move a part of the base into the first factors; of the first two the base tells which
MOVING = ("pissa", "olora", "pissa_niter_N", "corda", "lora_ga")


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
    variant: Variant = field(default_factory=Variant)
    tokens: Tokens = field(default_factory=Tokens)
    init: str | None = None

    def rank(self, module: str) -> int | None:
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module), self.r)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module), self.alpha)


def parse(config: Mapping[str, Any], *, alpha: float | None = None, initial: bool = False) -> LoraConfig:
    """The config checked field by field; every fault is collected.

    `initial` is whether the adapter as it was initialised is at hand. Raises UnsupportedError for settings that change the
    arithmetic, FormatError for values that are no settings, AmbiguousError when lora_alpha is missing and `alpha` does not give it.
    """
    faults: list[LoratoolsError] = []
    faults += [unknown(name) for name, value in config.items() if name not in USED + TRAINING and name not in REFUSED and given(value)]
    faults += [UnsupportedError(f"{name}: {why}", found=short(config[name])) for name, why in REFUSED.items() if given(config.get(name))]
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
        variant=variant_of(values),
        tokens=tokens_of(values),
        init=_init(values, initial),
        **_parameters(values),
        **_targets(values),
    )
    values.flag("merge_weights")
    if result.init and not result.variant.plain:
        faults.append(FormatError(f"init_lora_weights {result.init!r} beside a variant of LoRA, which peft cannot load"))
    if result.init == "olora" and values.flag("fan_in_fan_out"):
        faults.append(UnsupportedError("peft's OLoRA changes weights stored (in, out) as if they were (out, in)"))
    if result.dora and result.lora_bias:
        faults.append(FormatError("use_dora and lora_bias exclude each other"))
    if result.parameters:
        # peft's ParamWrapper takes none of these
        excluded = ("use_dora", "lora_bias", "fan_in_fan_out")
        faults += [FormatError(f"target_parameters and {name} exclude each other") for name in excluded if given(config.get(name))]
        if result.variant != Variant():
            faults.append(FormatError("target_parameters beside a variant of LoRA, which peft refuses"))
    raise_all(faults)
    return result


def _targets(values: Values) -> dict[str, Any]:
    found = targets_of(values, own_biases="lora_only", carried=_KEPT)
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


def _init(values: Values, initial: bool) -> str | None:
    """The initialisation that changed the base, None where none did; what cannot be undone is a fault."""
    stated = values.config.get("init_lora_weights")
    init = stated.lower() if isinstance(stated, str) else stated
    if init in INITS:
        if initial and init not in (None, True, "true"):
            fact = "--initial is for adapters whose initialisation changed the base, which this one left as it was"
            values.faults.append(FormatError(fact, found=f"init_lora_weights {stated!r}"))
        return None
    if init == "loftq":
        remedy = "merge into the base that LoftQ left, as model.unload() gives it before training, with init_lora_weights true"
        values.faults.append(UnsupportedError("LoftQ quantised the base before training, and trained from there", remedy=remedy))
        return None
    known = "pissa_niter_N" if isinstance(init, str) and re.fullmatch(r"pissa_niter_\d+", init) else init
    if known not in MOVING:
        values.fault("init_lora_weights", ", ".join(str(name) for name in (*INITS[1:3], *INITS[5:], *MOVING, "loftq")))
    elif not initial and known not in MOVING[:2]:
        remedy = "give the adapter as it was initialised with --initial, or save it with path_initial_model_for_weight_conversion"
        fact = "init_lora_weights changed the base before training, in a way that neither file tells"
        values.faults.append(UnsupportedError(fact, found=stated, remedy=remedy))
    return str(init)
