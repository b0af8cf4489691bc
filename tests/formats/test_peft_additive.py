"""Rows of peft's additive methods: how each reads a file made by hand, and what each says of one that does not fit its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import merge
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled
from loratools.deltas.lokr import LoKr
from loratools.errors import Faults, FormatError, LoratoolsError, ShapeError, UnsupportedError
from loratools.formats import load
from tests.files import read_checkpoint, write_adapter, write_checkpoint
from tests.strategies import randn

ROOT = "base_model.model.x."


def given(kind: str, shapes: dict[str, tuple[int, ...]], **config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of ones under one module's keys, and their config."""
    tensors = {ROOT + slot: torch.ones(shape) for slot, shape in shapes.items()}
    return tensors, {"peft_type": kind, "target_modules": ["x"]} | config


ADALORA = given("ADALORA", {"lora_A": (3, 6), "lora_B": (4, 3), "lora_E": (3, 1)}, init_r=3, lora_alpha=2)
LOKR = given("LOKR", {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 3)}, r=1, alpha=2)
C3A = given("C3A", {"c3a_kernel": (2, 3, 2)}, block_size=2, block_size_pattern={})
MISS = given("MISS", {"miss_block": (2, 4)}, r=2, mini_r=4, init_weights=True)
BAT = given("MISS", {"miss_block": (2, 2, 2)}, r=2, mini_r=1, init_weights="bat")
GRALORA = given("GRALORA", {"gralora_A": (2, 3, 4), "gralora_B": (2, 4, 2)}, r=4, alpha=2, gralora_k=2, hybrid_r=0)
HYBRID = given("GRALORA", {"gralora_A_general.weight": (1, 6), "gralora_B_general.weight": (4, 1)})[0]
WAVEFT = given(
    "WAVEFT", {"waveft_spectrum": (5,)}, n_frequency=5, scaling=1.0, random_loc_seed=0, wavelet_family="db1", use_idwt=True,
    proportional_parameters=False,
)  # fmt: skip
SUPER = given("SUPERTUNING", {"supertuning_values": (2,)}, r=None, lora_alpha=None)
PLACES = {f"{ROOT}supertuning_indices": torch.arange(2, dtype=torch.int32)}
BEFT = given("BEFT", {"beft_bias": (1, 4)})

FAULTS: dict[str, tuple[tuple[dict[str, Tensor], dict[str, Any]], dict[str, Any], type[LoratoolsError], str]] = {
    "adalora, another first rank": (ADALORA, {"init_r": 4}, ShapeError, "after what rank_pattern takes off: found 3, expected 4"),
    "adalora, no first rank": (ADALORA, {"init_r": None}, FormatError, "lacks init_r"),
    "adalora, a variant": (ADALORA, {"use_dora": True}, UnsupportedError, "use_dora"),
    "lokr, another rank": (LOKR, {"r": 2}, ShapeError, "the rank is not the config's: found 1, expected 2"),
    "lokr, no rank": (LOKR, {"r": None}, FormatError, "lacks r"),
    "lokr, two spellings of a factor": ((LOKR[0] | {f"{ROOT}lokr_w2": torch.ones(2, 3)}, LOKR[1]), {}, Faults, "not used by this"),
    "lokr, half a factor": (({k: v for k, v in LOKR[0].items() if "w2_a" not in k}, LOKR[1]), {}, FormatError, "has no lokr_w2_a beside"),
    "c3a, another block": (C3A, {"block_size": 4}, ShapeError, "block is not as large as the config's: found 2, expected 4"),
    "c3a, a block that is a word": (C3A, {"block_size": "2"}, FormatError, "block_size: found '2', expected a whole number"),
    "miss, a variant that peft has not": (MISS, {"init_weights": "cat"}, FormatError, "init_weights: found 'cat', expected true, false"),
    "miss, no variant": (MISS, {"init_weights": None}, FormatError, "init_weights: found None"),
    "miss, another width": (MISS, {"init_weights": "mini", "mini_r": 2}, ShapeError, "not as wide as mini_r: found 4, expected 2"),
    "miss, another rank": (MISS, {"r": 4}, ShapeError, "the rank is not the config's: found 2, expected 4"),
    "miss, blocks without bat": (BAT, {"init_weights": True}, ShapeError, r"no matrix to repeat: found \[2, 2, 2\]"),
    "bat, another rank": (BAT, {"r": 4}, ShapeError, "the rank is not the config's: found 2, expected 4"),
    "gralora, other parts": (GRALORA, {"gralora_k": 4}, ShapeError, "not as many parts as gralora_k: found 2, expected 4"),
    "gralora, another rank": (GRALORA, {"r": 2}, ShapeError, "the rank is not the config's: found 4, expected 2"),
    "gralora, no hybrid": (GRALORA, {"hybrid_r": 1}, FormatError, "has no gralora_B_general.weight beside it"),
    "gralora, a hybrid too many": ((GRALORA[0] | HYBRID, GRALORA[1]), {}, Faults, "not used by this method's formula"),
    "gralora, another hybrid": ((GRALORA[0] | HYBRID, GRALORA[1]), {"hybrid_r": 2}, ShapeError, "not hybrid_r: found 1, expected 2"),
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


@pytest.mark.parametrize("made", [ADALORA, LOKR, C3A, MISS, BAT, GRALORA, WAVEFT, (SUPER[0] | PLACES, SUPER[1]), BEFT])
def test_what_was_changed_was_good(tmp_path: Path, made: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    adapter = load(write_adapter(tmp_path / "adapter", *made))
    assert list(adapter) == ["x.bias" if "BEFT" in made[1]["peft_type"] else "x.weight"]


def test_a_whole_factor_with_a_kernel_is_exchanged_where_peft_exchanges_it(tmp_path: Path) -> None:
    for number, (kernel, expected) in enumerate((((), False), ((3,), True), ((3, 3), False))):
        tensors, config = given("LOKR", {"lokr_w1": (2, 2), "lokr_w2": (2, 3, *kernel)}, r=9, alpha=3)
        delta = load(write_adapter(tmp_path / str(number), tensors, config))["x.weight"]
        assert isinstance(delta, Unsettled) and isinstance(delta.delta, LoKr)
        assert delta.delta.exchanged == expected and delta.delta.scale == 3 / 9


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
