"""peft's methods × the layers each supports: saved by peft, merged from disk, compared with peft's own forward on fresh inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools import inspect, merge
from loratools.formats.peft_methods import METHODS
from tests.interop.methods import all_cases
from tests.interop.zoo import difference, merged_outputs, new_base, outputs

CASES = all_cases()


@pytest.mark.parametrize("name", CASES)
def test_merged_is_what_peft_computes(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = case.wrapped(tmp_path)
    receipt = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", transposed=case.transposed)
    assert receipt["applied"] == receipt["expected"] >= len(case.layers)
    before, expected = outputs(new_base(tmp_path / "unused", torch.float32)), outputs(model)
    errors = difference(merged_outputs(tmp_path / "out"), expected)
    assert max(errors.values()) <= case.tolerance, errors
    moved = difference({layer: before[layer] for layer in case.layers}, {layer: expected[layer] for layer in case.layers})
    assert min(moved.values()) > 1e-2, moved  # the comparison has something to see on every layer


@pytest.mark.parametrize("name", CASES)
def test_inspect_knows_it(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.wrapped(tmp_path)
    told = inspect(tmp_path / "adapter", base=tmp_path / "base", transposed=case.transposed)
    assert {row["name"].rpartition(".")[0] for row in told["modules"]} == set(case.layers)
    assert inspect(tmp_path / "adapter")["modules_total"] >= len(case.layers)


def test_every_method_has_a_case() -> None:
    found = {str(case.config(**{"target_modules": list(case.layers), **case.settings}).peft_type.value) for case in CASES.values()}
    assert found - {"LORA"} == set(METHODS)
