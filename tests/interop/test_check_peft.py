"""peft, live: keys that check says peft ignores leave the model as it was, and those of a clean adapter change it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loratools
from tests.workflows._adapters import folder

peft = pytest.importorskip("peft")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.q_proj, self.self_attn.v_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)
        self.mlp.up_proj = nn.Linear(8, 12, bias=False)


def changed(path: Path) -> int:
    """How many modules of a model the adapter changes, as peft loads it."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([Layer()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the keys that it does not find
        loaded = peft.PeftModel.from_pretrained(model, path)
    layers = [layer for layer in loaded.modules() if hasattr(layer, "get_delta_weight")]
    return sum(bool(layer.get_delta_weight("default").any()) for layer in layers)


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (None, lambda key: key),
        (None, lambda key: key.replace(".weight", ".default.weight")),
        ("names", lambda key: key.replace(".weight", ".mine.weight")),
        ("wrappers", lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.")),
        ("prefix", lambda key: key.removeprefix("base_model.model.")),
    ],
)
def test_check_says_which_keys_peft_ignores(rule: str | None, change: Callable[[str], str], tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)
    found = loratools.check(path, "peft")
    assert {row["rule"] for row in found["findings"]} == ({rule} if rule else set())
    assert changed(path) == (0 if rule else 3)
    loratools.fit(path, tmp_path / "out", "peft")
    assert changed(tmp_path / "out") == 3


def test_what_was_fitted_of_a_key_with_a_name_has_the_same_factors(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    plain = load_file(file)
    save_file({key.replace(".weight", ".mine.weight"): tensor for key, tensor in plain.items()}, file)
    loratools.fit(path, tmp_path / "out", "peft")
    fitted = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert fitted.keys() == plain.keys() and all(torch.equal(fitted[key], plain[key]) for key in plain)
