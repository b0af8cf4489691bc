"""Quantised bases, recognised by their config or by the tensors they keep beside a weight: recognised, not guessed at.

The table follows transformers' `quantizers/auto.py` and the files its quantisers write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.refs import Spec

# scheme by an ending that only its files have
_ENDINGS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes nf4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes fp4",
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes int8",
    ".g_idx": "gptq",
    ".qweight": "gptq or awq",
    ".weight_scale_inv": "fp8 with block scales",
    ".weight_packed": "compressed-tensors",
    ".scale_weight": "scaled fp8",
    ".comfy_quant": "ComfyUI's mixed precision",
    "_blocks": "mxfp4",
}


def scheme(specs: Mapping[str, Spec], config: Mapping[str, Any]) -> str | None:
    """The quantisation's name, from the config (nested ones too) or from tensors, or None."""
    named = (label for name in specs if (label := _by_name(name, specs)))
    shown = (label for name, spec in specs.items() if (label := _by_dtype(name, spec, specs)))
    return method(config) or next(named, None) or next(shown, None)


def method(config: Mapping[str, Any]) -> str | None:
    """The quantisation that a config, or one nested in it, states."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        found = part.get("quantization_config") or part.get("quantization")
        if isinstance(found, Mapping) and found:
            return _named(found)
    return None


def _named(found: Mapping[str, Any]) -> str:
    bitsandbytes = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else None
    return str(found.get("quant_method") or bitsandbytes or found.get("mode") or "mlx")


def _by_name(name: str, specs: Mapping[str, Spec]) -> str | None:
    """What a name that only quantisers write tells."""
    for ending, label in _ENDINGS.items():
        if name.endswith(ending) and (ending != "_blocks" or name.removesuffix("_blocks") + "_scales" in specs):
            return label
    return None


def _by_dtype(name: str, spec: Spec, specs: Mapping[str, Spec]) -> str | None:
    """What a narrow dtype with scales beside it tells."""
    narrow = spec.dtype.startswith(("F8", "F6", "F4"))
    whole = spec.dtype in ("U32", "I32", "U8", "I8") and name.endswith("weight")
    if (narrow or whole) and f"{name}_scale" in specs:
        return f"{spec.dtype} with scales"
    return "mlx" if whole and name.removesuffix("weight") + "scales" in specs else None
