"""peft's other methods, and KaSA, there and back: what peft saved, read and written again, is the same file, and the same model in peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file

from loratools import convert, merge
from loratools.formats import load
from loratools.formats.peft_methods import METHODS
from tests.formats.matrix import check_same
from tests.interop.methods import Case, all_cases
from tests.interop.zoo import difference, merged_outputs, new_base, outputs


def type_of(case: Case) -> str:
    return str(case.config(**{"target_modules": list(case.layers), **case.settings}).peft_type.value)


CASES = {name: case for name, case in all_cases().items() if type_of(case) != "LORA" or name.startswith("kasa")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def written(tmp_path: Path, case: Case) -> list[Path]:
    """The adapter of peft written again: read alone, with its base, and by way of loratools' own format."""
    based = {"base": tmp_path / "base", "transposed": case.transposed}
    convert(tmp_path / "adapter", tmp_path / "alone", format="peft")
    convert(tmp_path / "adapter", tmp_path / "based", format="peft", **based)
    convert(tmp_path / "adapter", tmp_path / "own.safetensors", format="loratools", **based)
    convert(tmp_path / "own.safetensors", tmp_path / "back", format="peft")
    return [tmp_path / name for name in ("alone", "based", "back")]


def loaded(tmp_path: Path, folder: Path) -> tuple[PeftModel, set[str]]:
    """The model as peft loads it, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(new_base(tmp_path / "fresh", torch.float32), folder).eval()
    return model, {str(warning.message) for warning in caught}


@pytest.mark.parametrize("name", CASES)
def test_a_method_there_and_back(tmp_path: Path, name: str) -> None:
    """The same keys and bits; in peft every key, no warning but those of its own file, the same bits; and merged to the same bits."""
    case = CASES[name]
    case.wrapped(tmp_path)
    theirs, told = loaded(tmp_path, tmp_path / "adapter")
    first, keeps = tensors(tmp_path / "adapter"), get_peft_model_state_dict(theirs, save_embedding_layers=False)
    expected = outputs(theirs)
    tried: list[dict[str, Any]] = []
    for folder in written(tmp_path, case):
        again = tensors(folder)
        assert set(again) == set(first)
        assert all(torch.equal(again[key], first[key]) and again[key].dtype == first[key].dtype for key in first)
        check_same(load(tmp_path / "adapter"), load(folder))
        if config(folder) in tried:
            continue
        tried.append(config(folder))
        model, more = loaded(tmp_path, folder)
        held = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert set(held) == set(again) and all(torch.equal(held[key], keeps[key]) for key in held)
        assert {warning for warning in more - told if "fan_in_fan_out" not in warning} == set()
        assert max(difference(outputs(model), expected).values()) == 0
        merge(tmp_path / "base", folder, tmp_path / f"merged-{folder.name}", transposed=case.transposed)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", transposed=case.transposed)
    bits = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert all(place.read_bytes() == bits for place in tmp_path.glob("merged-*/model.safetensors"))
    assert max(difference(merged_outputs(tmp_path / "merged"), expected).values()) <= case.tolerance


def test_all_that_is_read_is_written_and_tried() -> None:
    assert {type_of(case) for case in CASES.values()} - {"LORA"} == set(METHODS)
    assert all(row.writing is not None for row in METHODS.values())


def test_no_field_is_written_that_peft_has_not(tmp_path: Path) -> None:
    for name in ("vera", "trainable tokens", "osf", "beft"):
        case = CASES[name]
        case.wrapped(tmp_path / name)
        convert(tmp_path / name / "adapter", tmp_path / name / "back", format="peft")
        fields = PEFT_TYPE_TO_CONFIG_MAPPING[type_of(case)].__dataclass_fields__
        assert set(config(tmp_path / name / "back")) <= set(fields)
