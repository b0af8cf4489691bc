"""adapter_config.json: every field of the live LoraConfig is known, settings that change the arithmetic are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loratools.errors import AmbiguousError, FormatError, LoratoolsError, UnsupportedError
from loratools.formats.peft_config import INITS, REFUSED, TRAINING, USED, parse
from loratools.formats.peft_targets import HEADS, pattern_key
from tests.files import peft_config

CONFIG = peft_config(target_modules=["q"])


def test_every_field_of_the_installed_peft_is_in_a_table() -> None:
    fields = {field.name for field in dataclasses.fields(PeftLoraConfig)}
    assert fields <= {*USED, *TRAINING, *REFUSED, "base_model_name_or_path"}
    assert not (set(USED) & set(TRAINING)) and not (set(REFUSED) & {*USED, *TRAINING})


def test_what_the_installed_peft_writes_by_default_is_read(tmp_path: Path) -> None:
    PeftLoraConfig(target_modules=["q", "v"], r=4, lora_alpha=3).save_pretrained(tmp_path)
    config = parse(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert (config.r, config.alpha, config.rslora, config.dora, config.lora_bias, config.bias) == (4, 3.0, False, False, False, "none")
    assert set(config.target) == {"q", "v"} and config.rank_pattern == {} and config.saved == ()


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("value", [True, {"a": 1}, [1], "x", 7])
def test_settings_that_change_the_arithmetic(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=name):
        parse(CONFIG | {name: value})


@pytest.mark.parametrize("name", [*REFUSED, *TRAINING, "field_of_a_later_peft"])
@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unset_is_unset(name: str, value: Any) -> None:
    assert parse(CONFIG | {name: value}).r == 2


@pytest.mark.parametrize("value", [True, 0.5, "new", [0], {"x": None}, 0, 0.0])
def test_an_unknown_field_that_is_set_is_named(value: Any) -> None:
    with pytest.raises(UnsupportedError, match="sets field_of_a_later_peft, which this version does not know"):
        parse(CONFIG | {"field_of_a_later_peft": value})


@pytest.mark.parametrize("name", TRAINING)
def test_training_fields_are_carried(name: str) -> None:
    assert parse(CONFIG | {name: "anything"}).carried[name] == "anything"


@pytest.mark.parametrize("init", [*INITS, "Gaussian", "True"])
def test_initialisations_that_leave_the_base_alone(init: Any) -> None:
    assert parse(CONFIG | {"init_lora_weights": init}).r == 2


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "unheard of", 3])
def test_initialisations_that_change_it(init: Any) -> None:
    with pytest.raises(UnsupportedError, match="init_lora_weights"):
        parse(CONFIG | {"init_lora_weights": init})


BAD = {
    "r": ["8", 0, -1, 2.0, True], "lora_alpha": ["16", float("nan"), float("inf"), True, [1]],
    "use_rslora": ["true", 1, {"a": 1}], "use_dora": [1],
    "lora_bias": ["yes"], "bias": ["some", 3], "rank_pattern": [[1], {"q": 0}, {"q": "4"}, {"(": 4}, {"(?i)q": 4}],
    "alpha_pattern": [{"q": None}, {"q": float("nan")}, {"[": 1}], "modules_to_save": [3, [3]], "target_modules": [3, [3], "(", {"q": 1}],
    "exclude_modules": ["[", 4], "layers_to_transform": ["1", [1.5], True], "layers_pattern": [["("], 3],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_values_that_are_none(name: str, value: Any) -> None:
    with pytest.raises(FormatError, match=name):
        parse(CONFIG | {name: value})


def test_all_faults_together() -> None:
    with pytest.raises(LoratoolsError) as caught:
        parse(CONFIG | {"r": "8", "use_dora": "x", "use_qalora": True, "mystery": 1})
    assert len(str(caught.value).splitlines()) == 4


def test_alpha_is_never_guessed() -> None:
    without = {name: value for name, value in CONFIG.items() if name != "lora_alpha"}
    with pytest.raises(AmbiguousError, match="--alpha-in"):
        parse(without)
    assert parse(without, alpha=5.0).alpha == parse(CONFIG, alpha=5.0).alpha == 5.0


def test_dora_and_lora_bias_exclude_each_other() -> None:
    with pytest.raises(FormatError, match="exclude each other"):
        parse(CONFIG | {"use_dora": True, "lora_bias": True})


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
