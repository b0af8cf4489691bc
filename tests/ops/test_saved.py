"""A norm's weight replaced alone, written for peft: with the base's own bias beside it peft loads it without a warning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from loratools import convert, merge
from loratools.adapter import Adapter
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.formats import load, save
from loratools.tensors import to_ref
from tests.files import raw, read_checkpoint, write_checkpoint
from tests.strategies import randn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=seed))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.q(x))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", Net().state_dict())
    low = LowRank(A=to_ref(randn(2, 6, seed=7)), B=to_ref(randn(6, 2, seed=8)), alpha=4.0, layer="linear")
    deltas = {"q.weight": low, "norm.weight": Replacement(value=to_ref(randn(6, seed=9)))}
    save(Adapter(deltas), tmp_path / "a.safetensors", format="loratools")
    return tmp_path


def told(folder: Path) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(Net(), folder)
    return model, [str(warning.message) for warning in caught]


def test_with_a_base_its_bias_comes_along(folder: Path) -> None:
    receipt = convert(folder / "a.safetensors", folder / "peft", format="peft", base=folder / "base")
    assert "saved with the base's own bias, for peft loads modules whole: norm" in receipt["notes"]
    model, warned = told(folder / "peft")
    assert warned == []
    merge(folder / "base", folder / "a.safetensors", folder / "one")
    merge(folder / "base", folder / "peft", folder / "other")
    one, other = (read_checkpoint(folder / name) for name in ("one", "other"))
    assert all(raw(one[name]) == raw(other[name]) for name in one)
    held = model.merge_and_unload().state_dict()
    assert raw(held["norm.weight"]) == raw(one["norm.weight"]) and raw(held["norm.bias"]) == raw(one["norm.bias"])


def test_without_a_base_it_is_told(folder: Path) -> None:
    receipt = convert(folder / "a.safetensors", folder / "peft", format="peft")
    (note,) = receipt["notes"]
    assert note.startswith("norms saved without a bias, which peft cannot load where the model has one; convert --base BASE puts")
    assert note.endswith(" in: norm")
    with pytest.raises(KeyError, match=r"norm\.bias"):
        told(folder / "peft")
    assert convert(folder / "peft", folder / "again")["notes"] == []  # of peft's own files it is as it was


def test_other_formats_and_modules_without_a_bias_stay_as_they_are(folder: Path) -> None:
    receipt = convert(folder / "a.safetensors", folder / "own.safetensors", format="loratools", base=folder / "base")
    assert receipt["notes"] == [] and set(load(folder / "own.safetensors")) == {"q.weight", "norm.weight"}
    bare = {name: tensor for name, tensor in Net().state_dict().items() if name != "norm.bias"}
    write_checkpoint(folder / "bare", bare)
    receipt = convert(folder / "a.safetensors", folder / "peft", format="peft", base=folder / "bare")
    assert receipt["notes"] == [] and set(load(folder / "peft")) == {"q.weight", "norm.weight"}
