"""What a config names and the file does not hold is told, and only that."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.formats.peft_config import parse
from loratools.formats.peft_notes import unused
from tests.files import peft_config

MODULES = ["model.layers.0.q_proj", "model.layers.1.q_proj"]


@pytest.mark.parametrize(
    ("config", "whole", "told"),
    [
        ({}, [], []),
        ({"target_modules": ["q_proj", "v_proj"]}, [], ["target_modules names v_proj,"]),
        ({"target_modules": ".*"}, [], []),
        ({"modules_to_save": ["head"]}, ["model.head.weight"], []),
        ({"modules_to_save": ["head", "norm"]}, ["model.head.weight"], ["modules_to_save names norm,"]),
        ({"rank_pattern": {"layers.0.*": 2}}, [], []),
        ({"rank_pattern": {"layers.7.*": 2}}, [], ["rank_pattern names layers.7.*,"]),
        ({"alpha_pattern": {"q_proj": 2, ".*": 3}}, [], ["alpha_pattern names .*,"]),
        ({"r": None}, [], ["lacks r: the tensors tell the ranks here, peft would take 8"]),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}, ["score.weight"], []),
    ],
)
def test_notes(config: dict[str, Any], whole: list[str], told: list[str]) -> None:
    stated = peft_config(target_modules=["q_proj"]) | config
    found = unused(parse(stated), stated, MODULES, whole)
    assert len(found) == len(told) and all(text in note for text, note in zip(told, found, strict=True)), found
