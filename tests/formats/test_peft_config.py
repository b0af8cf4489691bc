"""adapter_config.json: every field of the live LoraConfig is known, settings that change the arithmetic are refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig as PeftLoraConfig

from loratools.errors import AmbiguousError, FormatError, LoratoolsError, UnsupportedError
from loratools.formats.peft_config import INITS, REFUSED, TRAINING, USED, parse
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


@pytest.mark.parametrize("init", ["pissa", "PiSSA", "olora"])
def test_initialisations_that_the_base_tells(init: str) -> None:
    config = CONFIG | {"init_lora_weights": init}
    assert parse(config).init == parse(config, initial=True).init == init.lower()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_initialisations_that_the_adapter_at_its_start_tells(init: str) -> None:
    said = rf"in a way that neither file tells: found {init}; give the adapter .* with --initial, or save"
    with pytest.raises(UnsupportedError, match=said):
        parse(CONFIG | {"init_lora_weights": init})
    assert parse(CONFIG | {"init_lora_weights": init}, initial=True).init == init


@pytest.mark.parametrize("initial", [False, True])
def test_initialisations_that_nothing_tells(initial: bool) -> None:
    with pytest.raises(UnsupportedError, match=r"LoftQ quantised the base .*; merge into the base that LoftQ left"):
        parse(CONFIG | {"init_lora_weights": "loftq"}, initial=initial)
    for value in ("unheard of", "pissa_niter_", "pissa_niter_x", 3, ["pissa"]):
        with pytest.raises(FormatError, match=r"init_lora_weights: found .*, expected True, False, gaussian"):
            parse(CONFIG | {"init_lora_weights": value}, initial=initial)


def test_an_initial_adapter_where_the_base_is_as_it_was() -> None:
    for init in (None, True, "true"):  # peft's documentation says to set true before saving it, and the trained one may have that too
        assert parse(CONFIG | {"init_lora_weights": init}, initial=True).init is None
    for init in (False, "gaussian", "eva", "orthogonal", "mica"):
        with pytest.raises(FormatError, match="--initial is for adapters whose initialisation changed the base"):
            parse(CONFIG | {"init_lora_weights": init}, initial=True)


def test_olora_on_weights_stored_transposed() -> None:
    with pytest.raises(UnsupportedError, match=r"peft's OLoRA changes weights stored \(in, out\) as if they were \(out, in\)"):
        parse(CONFIG | {"init_lora_weights": "olora", "fan_in_fan_out": True})
    assert parse(CONFIG | {"init_lora_weights": "pissa", "fan_in_fan_out": True}).init == "pissa"


BAD = {
    "r": ["8", 0, -1, 2.0, True], "lora_alpha": ["16", float("nan"), float("inf"), 10**400, True, [1]],
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
