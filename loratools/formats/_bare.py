"""Whose bare factors `lora_A` and `lora_B` are: litgpt's, of its network, or loralib's, of any."""

from __future__ import annotations

from loratools.formats.base import Container
from loratools.layouts.trainers import of_litgpt

HYPER = "hyperparameters.yaml"  # which litgpt leaves beside


def is_litgpt(container: Container) -> bool:
    """Whether they are of modules that only litgpt's network calls so, or of a head alone beside litgpt's hyperparameters."""
    if of_litgpt(container.tensors):
        return True
    return set(container.tensors) == {"lm_head.lora_A", "lm_head.lora_B"} and "lora_r" in container.beside.get(HYPER, {})
