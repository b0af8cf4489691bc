"""Rows of peft's methods of few numbers and of replaced ones: files made by hand, and what each row says of one that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import merge
from loratools.deltas.full import Full, Replacement
from loratools.errors import FormatError, LoratoolsError, ShapeError
from loratools.formats import load
from tests.files import read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

ROOT = "base_model.model.x."


def given(kind: str, shapes: dict[str, tuple[int, ...]], **config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of ones under one module's keys, and their config."""
    tensors = {ROOT + slot: torch.ones(shape) for slot, shape in shapes.items()}
    return tensors, {"peft_type": kind, "target_modules": ["x"]} | config


WAVEFT = given(
    "WAVEFT", {"waveft_spectrum": (5,)}, n_frequency=5, scaling=1.0, random_loc_seed=0, wavelet_family="db1", use_idwt=True,
    proportional_parameters=False,
)  # fmt: skip
SUPER = given("SUPERTUNING", {"supertuning_values": (2,)}, r=None, lora_alpha=None)
PLACES = {f"{ROOT}supertuning_indices": torch.arange(2, dtype=torch.int32)}
BEFT = given("BEFT", {"beft_bias": (1, 4)})

FAULTS: dict[str, tuple[tuple[dict[str, Tensor], dict[str, Any]], dict[str, Any], type[LoratoolsError], str]] = {
    "waveft, other coefficients": (WAVEFT, {"n_frequency": 6}, ShapeError, "coefficients as n_frequency: found 5, expected 6"),
    "waveft, another wavelet": (WAVEFT, {"wavelet_family": "haar"}, FormatError, "wavelet_family: found 'haar', expected db1 or db2"),
    "waveft, a flag that is a word": (WAVEFT, {"use_idwt": "yes"}, FormatError, "use_idwt: found 'yes', expected true or false"),
    "supertuning, no places": (SUPER, {}, FormatError, "has no supertuning_indices beside it; save the adapter with"),
    "supertuning, an alpha alone": (
        (SUPER[0] | PLACES, SUPER[1]), {"lora_alpha": 2.0}, FormatError, r"sets lora_alpha, and no r: found 2\.0"
    ),
    "supertuning, no factors": ((SUPER[0] | PLACES, SUPER[1]), {"r": 2, "lora_alpha": 2.0}, FormatError, "has no supertuning_lora_A"),
    "beft, no row": (({f"{ROOT}beft_bias": torch.ones(4)}, BEFT[1]), {}, ShapeError, r"no bias in a row: found \[4\], expected \[1, out\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    (tensors, config), change, kind, words = FAULTS[fault]
    folder = write_adapter(tmp_path / "adapter", tensors, config | change)
    with pytest.raises(kind, match=words) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("made", [WAVEFT, (SUPER[0] | PLACES, SUPER[1]), BEFT])
def test_what_was_changed_was_good(tmp_path: Path, made: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    adapter = load(write_adapter(tmp_path / "adapter", *made))
    assert list(adapter) == ["x.bias" if "BEFT" in made[1]["peft_type"] else "x.weight"]


def test_a_bias_and_a_norm(tmp_path: Path) -> None:
    W = {"x.weight": randn(4, seed=0), "x.bias": randn(4, seed=1), "y.weight": randn(3, 4, seed=2), "y.bias": randn(3, seed=3)}
    base = write_checkpoint(tmp_path / "base", W)
    row = {"base_model.model.y.beft_bias": randn(1, 3, seed=4)}
    bias = load(write_adapter(tmp_path / "beft", row, BEFT[1] | {"target_modules": ["y"]}))
    assert isinstance(bias["y.bias"], Full) and list(bias) == ["y.bias"]
    merge(base, bias, tmp_path / "one")
    assert torch.equal(read_checkpoint(tmp_path / "one")["y.bias"], (W["y.bias"].double() + randn(1, 3, seed=4)[0].double()).float())
    new = {f"{ROOT}ln_tuning_layers.{leaf}": randn(4, seed=5 + index) for index, leaf in enumerate(("weight", "bias"))}
    norm = load(write_adapter(tmp_path / "ln", new, {"peft_type": "LN_TUNING", "target_modules": ["x"]}))
    assert all(isinstance(delta, Replacement) for delta in norm.values())
    merge(base, norm, tmp_path / "two")
    merged = read_checkpoint(tmp_path / "two")
    assert torch.equal(merged["x.weight"], randn(4, seed=5)) and torch.equal(merged["x.bias"], randn(4, seed=6))
    longer = load(write_adapter(tmp_path / "longer", {key: torch.ones(5) for key in new}, {"peft_type": "LN_TUNING"}))
    with pytest.raises(LoratoolsError, match=r"x\.weight: the saved tensor does not fit the base's: found \[5\], expected \[4\]"):
        merge(base, longer, tmp_path / "three")
