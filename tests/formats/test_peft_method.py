"""A row of the table at work: what it does not name, does not use or does not find is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import FormatError, LoratoolsError, MatchError, ShapeError, UnsupportedError
from loratools.formats import load
from loratools.formats.base import Container, ReadOptions
from loratools.formats.peft_method import Method, read
from loratools.formats.peft_methods import GONE, NOT_TOLD, NOT_WEIGHTS, method_of
from loratools.formats.peft_part import Part
from loratools.tensors import to_ref
from tests.files import write_adapter

ROOT = "base_model.model."
LOHA = {f"{ROOT}x.hada_w{i}_{side}": torch.ones(*shape) for i in (1, 2) for side, shape in (("a", (5, 2)), ("b", (2, 3)))}
CONFIG: dict[str, Any] = {"peft_type": "LOHA", "r": 2, "alpha": 4, "target_modules": ["x"]}

FAULTS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], type[LoratoolsError], str]] = {
    "a partner missing": ({k: v for k, v in LOHA.items() if "w2_b" not in k}, {}, FormatError, r"x\.hada_w\w+: has no hada_w2_b beside it"),
    "a core alone": (LOHA | {f"{ROOT}x.hada_t1": torch.ones(2, 2, 3, 3)}, {}, ShapeError, "do not meet"),
    "a stray slot": (LOHA | {f"{ROOT}x.hada_w3_a": torch.ones(2)}, {}, MatchError, r"hada_w3_a: neither a tensor of the method"),
    "a module that is no target": (
        LOHA | {k.replace("x.", "y."): v for k, v in LOHA.items()}, {}, MatchError, r"y\.hada_w1_a: the config does not target"
    ),
    "no alpha": (LOHA, {"alpha": None}, FormatError, "adapter_config.json lacks alpha"),
    "an alpha that is a word": (LOHA, {"alpha": "4"}, FormatError, "alpha: found '4', expected a number"),
    "another rank": (LOHA, {"r": 3}, ShapeError, "the rank is not the config's: found 2, expected 3"),
    "a pattern that is no table": (LOHA, {"rank_pattern": [1]}, FormatError, r"rank_pattern: found \[1\]"),
    "a field that the row lacks": (LOHA, {"use_dora": True}, UnsupportedError, "sets use_dora, which this version does not know"),
    "biases of no such method": (LOHA, {"bias": "lora_only"}, FormatError, "bias: found 'lora_only', expected none or all"),
    "factors that do not meet": (LOHA | {f"{ROOT}x.hada_w2_b": torch.ones(1, 3)}, {}, ShapeError, r"w_a \[5, 2\], w_b \[1, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_said_by_the_row_is_an_error(tmp_path: Path, fault: str) -> None:
    tensors, more, error, text = FAULTS[fault]
    folder = write_adapter(tmp_path / "adapter", tensors, CONFIG | more)
    with pytest.raises(error, match=text) as caught:
        load(folder)
    assert "adapter_model.safetensors" in str(caught.value)


def test_a_setting_by_pattern_goes_before_the_setting(tmp_path: Path) -> None:
    for patterns, scale in (({}, 2.0), ({"alpha_pattern": {"x": 3}}, 1.5), ({"alpha_pattern": {"y": 3}}, 2.0)):
        folder = write_adapter(tmp_path / str(len(patterns)) / str(scale), LOHA, CONFIG | patterns)
        assert load(folder)["x.weight"].facts()["scaling"] == scale


def test_a_slot_that_the_formula_does_not_use_is_an_error() -> None:
    def make(part: Part) -> Any:
        return method_of("LOHA").make(part)

    row = Method(peft_type="LOHA", title="", slots=("hada_w[12]_[ab]", "more"), settings=("r", "alpha"), make=make)
    tensors = {key: to_ref(tensor) for key, tensor in (LOHA | {f"{ROOT}x.more": torch.ones(1)}).items()}
    with pytest.raises(FormatError, match=r"x\.more: not used by this method's formula"):
        read(Container(tensors, config=CONFIG), ReadOptions(), row)


@pytest.mark.parametrize("peft_type", [*NOT_WEIGHTS, *NOT_TOLD, *GONE])
def test_what_is_no_weight_edit_is_refused_by_name_and_reason(tmp_path: Path, peft_type: str) -> None:
    folder = write_adapter(tmp_path / "adapter", {"prompt_embeddings": torch.ones(2, 3)}, {"peft_type": peft_type})
    with pytest.raises(UnsupportedError, match=rf"peft's {peft_type}"):
        load(folder)


def test_a_type_that_peft_has_not(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", LOHA, {"peft_type": "LOHAX"})
    with pytest.raises(FormatError, match=r"found LOHAX, expected .*LOHA"):
        load(folder)
