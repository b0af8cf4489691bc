"""Rows of methods whose layers share tensors: banks drawn again, copies, and what a file does not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import combine, inspect, merge
from loratools.errors import FormatError, LoratoolsError, MatchError, ShapeError, UnsupportedError
from loratools.formats import load
from tests.files import read_adapter, write_adapter, write_checkpoint
from tests.interop.cases_banked import CASES
from tests.interop.zoo import TRANSPOSED, difference, merged_outputs, outputs
from tests.strategies import randn

ROOT = "base_model.model."
VERA: dict[str, Any] = {"peft_type": "VERA", "r": 2, "projection_prng_key": 0, "save_projection": False, "target_modules": ["up", "down"]}
SIZES = {"layers.0.up": (9, 5), "layers.0.down": (5, 9), "layers.1.up": (9, 5), "layers.1.down": (5, 9)}


def vera(*modules: str) -> dict[str, torch.Tensor]:
    return {
        f"{ROOT}{module}.vera_lambda_{name}": randn(size, seed=size)
        for module in modules
        for name, size in (("b", SIZES[module][0]), ("d", 2))
    }


def base(folder: Path, *modules: str) -> Path:
    return write_checkpoint(folder, {f"{module}.weight": randn(*SIZES[module], seed=1) for module in modules})


def test_drawn_projections_are_told_and_need_every_layer(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", vera(*SIZES), VERA)
    receipt = merge(base(tmp_path / "base", *SIZES), adapter, tmp_path / "out")
    assert receipt["applied"] == 4
    assert receipt["notes"] == ["its projections are not in the file: drawn again from projection_prng_key 0, as peft does"]
    told = inspect(adapter, base=tmp_path / "base")
    assert told["parameters"] == 9 + 5 + 9 + 5 + 4 * 2 and [row["shape"] for row in inspect(adapter)["modules"]] == [[5], [9], [5], [9]]


def test_a_kind_of_layer_missing_from_the_file_would_make_other_projections(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", *SIZES)
    adapter = write_adapter(tmp_path / "adapter", vera("layers.0.up", "layers.1.up"), VERA)
    with pytest.raises(LoratoolsError, match=r"layers\.0\.down\.weight: the adapter's config covers this weight") as caught:
        merge(folder, adapter, tmp_path / "out")
    assert "layers.1.down.weight" in str(caught.value)


def test_a_layer_missing_from_the_base_would_make_other_projections(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", "layers.0.up", "layers.0.down", "layers.1.up")
    adapter = write_adapter(tmp_path / "adapter", vera(*SIZES), VERA)
    with pytest.raises(UnsupportedError, match="as large as all its layers need, and the base lacks some; give the base that it was"):
        merge(folder, adapter, tmp_path / "out", allow_unmatched=True)
    with pytest.raises(MatchError, match=r"layers\.1\.down\.weight: the base has no such weight"):
        merge(folder, adapter, tmp_path / "out")


BANK = {"base_model.vera_A": randn(2, 9, seed=0), "base_model.vera_B": randn(9, 2, seed=1)}
FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], type[LoratoolsError], str]] = {
    "projections that peft would drop": (
        "vera", {}, {"save_projection": False}, FormatError, "save_projection is false, so peft would drop vera_A and make its own"
    ),
    "projections that are not there": (
        "vera", {"base_model.vera_A": None}, {}, FormatError,
        "the file has no base_model.vera_A; the file is incomplete; if it was saved without projections, set save_projection to false",
    ),
    "a seed that is none": ("vera, drawn", {}, {"projection_prng_key": 1.5}, FormatError, "prng_key: found 1.5, expected a whole"),
    "a seed too large": ("vera, drawn", {}, {"projection_prng_key": 1 << 63}, FormatError, "expected a whole number of 64 bits"),
    "a noisy forward": ("pvera", {}, {"sample_at_inference": True}, UnsupportedError, "sample_at_inference: adds noise to every forward"),
    "copies that peft would drop": ("randlora", {}, {"save_projection": False}, FormatError, "peft would drop randlora_A"),
    "another number of vectors": ("vblora", {}, {"num_vectors": 9}, ShapeError, r"not the config's: found \[12, 4\], expected \[9, 4\]"),
    "weights that peft would drop": (
        "vblora, weights", {}, {"save_only_topk_weights": False}, FormatError, "save_only_topk_weights is false, so peft would drop"
    ),
    "logits and weights": (
        "vblora, weights", {f"{ROOT}linear.vblora_logits_A": torch.ones(3, 12, 12)}, {}, FormatError,
        "linear.vblora_logits_A_topk_indices: not used by this method's formula",
    ),
    "θ of another length": ("unilora", {}, {"theta_d_length": 31}, ShapeError, "θ is not of the config's length: found 30, expected 31"),
    "no indices": (
        "unilora", {}, {"save_indices": False}, UnsupportedError,
        "save_indices is not set: where each number stands is not in the file.* load it with peft, set save_indices in its config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_file_does_not_tell_is_an_error(tmp_path: Path, fault: str) -> None:
    case, tensors, config, error, text = FAULTS[fault]
    CASES[case].wrapped(tmp_path)
    held, stated = read_adapter(tmp_path / "adapter")
    changed = {name: tensor for name, tensor in {**held, **tensors}.items() if tensor is not None}
    with pytest.raises(LoratoolsError, match=text) as caught:
        load(write_adapter(tmp_path / "changed", changed, stated | config))
    assert any(isinstance(one, error) for one in getattr(caught.value, "errors", [caught.value]))


def test_unilora_without_indices_is_refused_though_nothing_else_is_in_the_file(tmp_path: Path) -> None:
    config = {"peft_type": "UNILORA", "r": 2, "theta_d_length": 4, "save_indices": False, "target_modules": ["x"]}
    with pytest.raises(UnsupportedError, match="save_indices is not set"):
        load(write_adapter(tmp_path / "adapter", {"base_model.unilora_theta_d": torch.ones(4)}, config))


def test_randlora_needs_no_copies_and_no_choice_of_how_a_weight_lies(tmp_path: Path) -> None:
    CASES["randlora"].wrapped(tmp_path)
    tensors, config = read_adapter(tmp_path / "adapter")
    bare = {name: tensor for name, tensor in tensors.items() if name.startswith("base_model.rand") or "lambda" in name or "gamma" in name}
    assert len(bare) == 6 and len(tensors) == 10
    merge(tmp_path / "base", write_adapter(tmp_path / "bare", bare, config), tmp_path / "one")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "other", transposed=["*linear"])  # 40 × 24: its longer side is B's
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("case", ["vera", "pvera, drawn", "vblora", "unilora", "tinylora", "vera, drawn, transposed"])
def test_a_sum_of_small_products_is_a_lora(tmp_path: Path, case: str) -> None:
    """The factors are the deltas' own, so it is exact but for the rounding of what is written; fields of the method stay behind."""
    model = CASES[case].wrapped(tmp_path)
    given = [f"{tmp_path}/adapter:0.25", f"{tmp_path}/adapter:0.75"]
    combine(given, tmp_path / "lora", base=tmp_path / "base", transposed=TRANSPOSED)
    assert read_adapter(tmp_path / "lora")[1]["peft_type"] == "LORA"
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", transposed=TRANSPOSED)
    errors = difference(merged_outputs(tmp_path / "out"), outputs(model))
    assert max(errors.values()) <= 1e-5, errors  # float32


def test_drawn_bases_tell_their_dtype(tmp_path: Path) -> None:
    for case, count in (("randlora, drawn", 2), ("randlora, drawn, transposed", 1)):
        CASES[case].wrapped(tmp_path / case)
        notes = load(tmp_path / case / "adapter").notes
        assert len(notes) == count and all("drawn" in note for note in notes)
        assert (count == 2) == any("bfloat16" in note for note in notes)
