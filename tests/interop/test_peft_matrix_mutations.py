"""Every single change to a saved adapter of every method is an error, or changes the merge as peft's own reading of it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loratools import merge
from loratools.errors import LoratoolsError
from loratools.formats.peft_methods import METHODS
from tests.files import read_adapter, write_adapter
from tests.interop.methods import Case, all_cases
from tests.interop.zoo import difference, merged_outputs, new_base, outputs

CASES = all_cases()
TENSORS: dict[str, Callable[[dict[str, Tensor], str], dict[str, Tensor]]] = {
    "deleted": lambda tensors, key: {name: tensor for name, tensor in tensors.items() if name != key},
    "renamed": lambda tensors, key: {f"{name}x" if name == key else name: tensor for name, tensor in tensors.items()},
    "of another module": lambda tensors, key: {
        name.replace("model.", "model.other.", 1) if name == key else name: tensor for name, tensor in tensors.items()
    },
    "with a stray beside it": lambda tensors, key: tensors | {f"{key}_more": tensors[key]},
    "one row more": lambda tensors, key: tensors | {key: torch.cat([tensors[key], tensors[key][:1]])},
    "flattened": lambda tensors, key: tensors | {key: tensors[key].reshape(-1, 1, 1, 1, 1, 1)},
    "nan": lambda tensors, key: tensors | {key: torch.full(tensors[key].shape, float("nan"))},
}


def merged(case: Case, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], base: Path) -> dict[str, Tensor] | str:
    """The outputs of what merge makes of an adapter, or its error."""
    write_adapter(folder / "adapter", tensors, config)
    try:
        merge(base, folder / "adapter", folder / "out", transposed=case.transposed)
    except LoratoolsError as error:
        assert not (folder / "out").exists()
        return str(error)
    return merged_outputs(folder / "out")


@pytest.mark.parametrize("name", CASES)
def test_every_change_of_a_tensor_is_an_error(tmp_path: Path, name: str) -> None:
    CASES[name].wrapped(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    silent = []
    for word, change in TENSORS.items():
        for number, key in enumerate(tensors):
            if isinstance(merged(CASES[name], tmp_path / word / str(number), change(tensors, key), config, tmp_path / "base"), dict):
                silent.append((word, key))
    harmless = CASES[name].harmless
    assert [(word, key) for word, key in silent if not any(word == known and key.endswith(end) for known, end in harmless)] == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.flips])
def test_another_setting_is_what_peft_reads(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.wrapped(tmp_path)
    before = merged_of(case, tmp_path, {})
    for setting, value in case.flips.items():
        after = merged_of(case, tmp_path, {setting: value})
        model = PeftModel.from_pretrained(new_base(tmp_path / "unused", torch.float32), tmp_path / f"{setting}" / "adapter")
        errors = difference(after, outputs(model.eval()))
        assert max(errors.values()) <= case.tolerance, (setting, errors)
        assert max(difference(after, before).values()) > 1e-3, setting


def merged_of(case: Case, folder: Path, change: dict[str, Any]) -> dict[str, Tensor]:
    tensors, config = read_adapter(folder / "adapter")
    found = merged(case, folder / "".join(change or ["before"]), tensors, config | change, folder / "base")
    assert isinstance(found, dict), found
    return found


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_a_setting_that_does_not_fit_is_an_error(tmp_path: Path, name: str) -> None:
    CASES[name].wrapped(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    for setting, value in CASES[name].refused.items():
        found = merged(CASES[name], tmp_path / setting, tensors, config | {setting: value}, tmp_path / "base")
        assert isinstance(found, str), setting


def test_every_setting_is_changed_in_some_case() -> None:
    """What a row says to matter to the arithmetic is seen to matter."""
    changed: dict[str, set[str]] = {}
    for case in CASES.values():
        kind = str(case.config(**{"target_modules": list(case.layers), **case.settings}).peft_type.value)
        changed.setdefault(kind, set()).update(case.flips, case.refused)
    assert {kind: set(row.settings) - changed[kind] for kind, row in METHODS.items()} == {kind: set() for kind in METHODS}
