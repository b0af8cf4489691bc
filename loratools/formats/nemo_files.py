"""What NeMo's `model_config.yaml` and Megatron-Bridge's `run_config.yaml` tell of a model and of its LoRA, and the latter as it is written.

    model_config.yaml   hidden_size, num_attention_heads, num_query_groups, kv_channels, peft: {lora_tuning: {adapter_dim, alpha}}
    run_config.yaml     model: {the same}, peft: {dim, alpha}

NeMo's alpha is adapter_dim where it is not told (`LoraPEFTConfig._create_lora_config`). NeMo 1 has other names for the same modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import FormatError, UnsupportedError
from loratools.formats._heads import Heads, heads_of
from loratools.formats._scalar import finite

RUN, CONFIG = "run_config.yaml", "model_config.yaml"
# NeMo 1's names of modules within a layer, and Megatron-Bridge's
OLDER = {
    "self_attention.adapter_layer.lora_kqv_adapter": "self_attention.linear_qkv.adapter",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": "self_attention.linear_qkv.adapter.adapter_q",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": "self_attention.linear_qkv.adapter.adapter_k",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": "self_attention.linear_qkv.adapter.adapter_v",
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attention.linear_proj.adapter",
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.linear_fc1.adapter",
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.gate_adapter": "mlp.linear_fc1.adapter.adapter_gate",
    "mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter": "mlp.linear_fc1.adapter.adapter_up",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.linear_fc2.adapter",
}
_TARGETS = {
    "linear_qkv": ("linear_q", "linear_k", "linear_v"), "linear_fc1": ("linear_fc1_up", "linear_fc1_gate"),
    "linear_proj": ("linear_proj",), "linear_fc2": ("linear_fc2",),
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What the config beside an adapter says, and which it is: LoRA's rank and alpha, the model's heads; None for what it lacks."""

    file: str = ""
    rank: int | None = None
    alpha: float | None = None
    heads: Heads | None = None


def told(beside: Mapping[str, Any]) -> Told:
    """What the files beside an adapter say. Raises FormatError for numbers that are none, UnsupportedError for an older order of rows."""
    run, config = beside.get(RUN, {}), beside.get(CONFIG, {})
    lora = run.get("peft")
    if isinstance(lora, Mapping) and lora:
        rank, alpha = _whole(RUN, "peft: dim", lora.get("dim")), _number(RUN, "peft: alpha", lora.get("alpha"))
        return Told(RUN, rank, alpha, _heads(RUN, run.get("model")))
    if config.get("megatron_legacy") is True:
        raise UnsupportedError(f"{CONFIG}: megatron_legacy, in which rows of q, k and v lie in another order, which is not read")
    inner = config.get("peft")
    lora = inner.get("lora_tuning") if isinstance(inner, Mapping) else None
    lora = lora if isinstance(lora, Mapping) else {}
    rank = _whole(CONFIG, "adapter_dim", lora.get("adapter_dim"))
    alpha = _number(CONFIG, "alpha", lora.get("alpha"))
    return Told(CONFIG, rank, rank if alpha is None else alpha, _heads(CONFIG, config))


def _whole(file: str, key: str, value: object) -> int | None:
    if value is not None and type(value) is not int:
        raise FormatError(f"{file}: {key}", found=value, expected="a whole number")
    return value


def _number(file: str, key: str, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not finite(value):
        raise FormatError(f"{file}: {key}", found=value, expected="a number")
    return float(value)


def _heads(file: str, config: object) -> Heads | None:
    """The heads by Megatron's words for them, None where it does not tell their number, or their size."""
    if not isinstance(config, Mapping):
        return None
    names = ("num_attention_heads", "num_query_groups", "kv_channels", "hidden_size")
    query, groups, size, hidden = (_whole(file, name, config.get(name)) for name in names)
    if query is None or (size is None and hidden is None):
        return None
    found = {"num_attention_heads": query, "num_key_value_heads": groups, "head_dim": size, "hidden_size": hidden}
    return heads_of(found)


def run_config(rank: int, alpha: float, modules: Iterable[str], *, dora: bool = False) -> dict[str, Any]:
    """run_config.yaml of modules that are written: the `peft` that Megatron-Bridge makes them of.

    Of canonical LoRA it makes adapters of q, k and v, and of gate and up, all together; those that a file lacks stay as they begin, and
    change nothing.
    """
    held = {part for module in modules for part in module.split(".") if part in _TARGETS}
    targets = [target for part, names in _TARGETS.items() if part in held for target in ([part] if dora else names)]
    peft: dict[str, Any] = {
        "_target_": "megatron.bridge.peft.dora.DoRA" if dora else "megatron.bridge.peft.canonical_lora.CanonicalLoRA",
        "dim": rank, "alpha": int(alpha) if alpha.is_integer() else alpha, "dropout": 0.0, "target_modules": targets,
    }  # fmt: skip
    return {"peft": peft}
