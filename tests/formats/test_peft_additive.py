"""Rows of peft's additive methods: how each reads a file made by hand, and what each says of one that does not fit its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.deltas.laid import Unsettled
from loratools.deltas.lokr import LoKr
from loratools.errors import Faults, FormatError, LoratoolsError, ShapeError, UnsupportedError
from loratools.formats import load
from tests.files import write_adapter

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
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str) -> None:
    (tensors, config), change, kind, words = FAULTS[fault]
    folder = write_adapter(tmp_path / "adapter", tensors, config | change)
    with pytest.raises(kind, match=words) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("made", [ADALORA, LOKR, C3A, MISS, BAT, GRALORA])
def test_what_was_changed_was_good(tmp_path: Path, made: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    adapter = load(write_adapter(tmp_path / "adapter", *made))
    assert list(adapter) == ["x.weight"]


def test_a_whole_factor_with_a_kernel_is_exchanged_where_peft_exchanges_it(tmp_path: Path) -> None:
    for number, (kernel, expected) in enumerate((((), False), ((3,), True), ((3, 3), False))):
        tensors, config = given("LOKR", {"lokr_w1": (2, 2), "lokr_w2": (2, 3, *kernel)}, r=9, alpha=3)
        delta = load(write_adapter(tmp_path / str(number), tensors, config))["x.weight"]
        assert isinstance(delta, Unsettled) and isinstance(delta.delta, LoKr)
        assert delta.delta.exchanged == expected and delta.delta.scale == 3 / 9
