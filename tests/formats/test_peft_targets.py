"""Which modules a config concerns: targeted, saved whole, by patterns, as the installed peft decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loratools.errors import FormatError, LoratoolsError
from loratools.formats._patterns import pattern_key
from loratools.formats.peft_config import parse
from loratools.formats.peft_targets import HEADS, targets_of
from loratools.formats.peft_values import Values
from tests.files import peft_config

CONFIG = peft_config(target_modules=["q"])


@pytest.mark.parametrize(("bias", "own", "found"), [
    ("none", None, "none"), (None, None, "none"), ("all", None, "all"), ("oft_only", "oft_only", "own"), ("all", "oft_only", "all"),
])  # fmt: skip
def test_biases_are_none_all_or_the_methods_own(bias: Any, own: str | None, found: str) -> None:
    faults: list[LoratoolsError] = []
    assert targets_of(Values({"bias": bias}, faults), own_biases=own, carried=())["bias"] == found and not faults


def test_another_methods_word_for_its_biases_is_a_fault() -> None:
    faults: list[LoratoolsError] = []
    targets_of(Values({"bias": "lora_only"}, faults), own_biases="oft_only", carried=())
    (fault,) = faults
    assert isinstance(fault, FormatError) and str(fault) == "bias: found 'lora_only', expected none or all or oft_only"


@pytest.mark.parametrize("task", HEADS)
def test_a_task_saves_its_head_unlisted(task: str) -> None:
    config = parse(CONFIG | {"task_type": task})
    assert all(config.saves(f"model.{head}") and config.saves(f"{head}.out") for head in HEADS[task]) and not config.saves("model.other")


names = st.sampled_from([
    "q", "k_proj", "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "layers.1.q_proj", "h.0.attn.c_attn", "lm_head",
    "a.layers.2.b.layers.3.q_proj", "blocks.1.experts.4.up_proj", "model.layers.1.score", "classifier.dense", "pre_classifier",
])  # fmt: skip
entries = st.sampled_from([
    "q_proj", "up_proj", "q", "_proj", "self_attn.q_proj", "lm_head", "classifier", "score", "layers.1.q_proj", "dense", "model", "layers",
])  # fmt: skip
regexes = st.sampled_from([r".*_proj", r".*\.1\..*", "q", r".*layers\.\d+\..*(q|up)_proj", "lm_head", "(.*)", r"layers\.1\.q_proj"])


@given(
    names, st.one_of(st.lists(entries, min_size=1), regexes), st.one_of(st.none(), st.lists(entries), regexes),
    st.lists(entries, max_size=2),
    st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 12))),
    st.one_of(st.none(), st.sampled_from(["layers", "blocks"]), st.just([])),
)  # fmt: skip
def test_targets_as_the_installed_peft_decides(module: str, target: Any, exclude: Any, saved: list[str], layers: Any, pattern: Any) -> None:
    if isinstance(target, str):
        layers = pattern = None
    theirs = PeftLoraConfig(target_modules=target, exclude_modules=exclude, modules_to_save=saved or None)
    theirs.layers_to_transform, theirs.layers_pattern = layers, pattern
    ours = parse(
        CONFIG
        | {
            "target_modules": target,
            "exclude_modules": exclude,
            "modules_to_save": saved,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
        }
    )
    assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), (ours, theirs)


@given(names, st.lists(st.sampled_from(["q_proj", "q", ".*", "^model.*", "layers.1.*", "(k|q)_proj", "_proj", r".*\.\d+\..*"]), max_size=4))
def test_patterns_as_the_installed_peft_decides(module: str, patterns: list[str]) -> None:
    assert pattern_key(patterns, module) == get_pattern_key(patterns, module)


def test_saves_by_the_rule_of_the_installed_peft() -> None:
    """`key.endswith(entry)`, so that `classifier` also means `pre_classifier`, and everything inside."""
    from peft import get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.pre_classifier, self.head = (
                torch.nn.Linear(2, 2),
                torch.nn.Linear(2, 2),
                torch.nn.Sequential(torch.nn.Linear(2, 2)),
            )

    model = get_peft_model(Net(), PeftLoraConfig(target_modules=["q"], modules_to_save=["classifier", "head"]))
    theirs = {
        name.partition("base_model.model.")[2] for name, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"
    }
    config = parse(CONFIG | {"modules_to_save": ["classifier", "head"]})
    assert theirs == {"pre_classifier", "head"}
    assert {name for name in ("q", "pre_classifier", "head", "head.0", "header") if config.saves(name)} == {*theirs, "head.0"}
