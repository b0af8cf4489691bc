"""convert, with peft 0.21.2 as the oracle: what it saved, converted, is loaded by peft again and computes the same."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from loratools import convert, merge
from loratools.errors import LoratoolsError
from tests.interop.methods import all_cases
from tests.interop.zoo import TARGETS, TRANSPOSED, difference, merged_outputs, new_base, outputs, wrap

CASES = all_cases()
FULL = 200  # a rank that no layer of the zoo reaches


def reloaded(folder: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The outputs of peft's own model under a converted adapter; a warning of peft's is an error."""
    zoo = new_base(folder / "fresh", dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Found missing).*")
        model = PeftModel.from_pretrained(zoo, adapter)
    return outputs(model.eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_as_dora_on_every_layer(tmp_path: Path, dtype: torch.dtype) -> None:
    model = wrap(new_base(tmp_path / "base", dtype), tmp_path / "lora", r=4, lora_alpha=6, target_modules=TARGETS)
    receipt = convert(tmp_path / "lora", tmp_path / "dora", kind="dora", base=tmp_path / "base", transposed=TRANSPOSED)
    assert len(receipt["tensors"]) == len(TARGETS) and all(row["error"] < 1e-6 for row in receipt["tensors"])
    errors = difference(reloaded(tmp_path, tmp_path / "dora", dtype), outputs(model))
    # magnitudes are float32: 2**-24 of each row of W'; peft then runs in float64
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_dora_as_lora_on_every_layer(tmp_path: Path, dtype: torch.dtype) -> None:
    model = wrap(new_base(tmp_path / "base", dtype), tmp_path / "dora", r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS)
    receipt = convert(tmp_path / "dora", tmp_path / "lora", kind="lora", base=tmp_path / "base", rank=FULL, transposed=TRANSPOSED)
    assert {row["kind"] for row in receipt["tensors"]} == {"lora"} and len(receipt["tensors"]) == len(TARGETS)
    errors = difference(reloaded(tmp_path, tmp_path / "lora", dtype), outputs(model))
    # float32 factors of full rank: 1e-7 of W' − W, which is of W's size
    assert max(errors.values()) <= 2e-6, errors


def test_dora_as_a_difference_merges_alike(tmp_path: Path) -> None:
    model = wrap(new_base(tmp_path / "base", torch.float32), tmp_path / "dora", r=4, use_dora=True, target_modules=TARGETS)
    convert(tmp_path / "dora", tmp_path / "dense.safetensors", kind="dense", base=tmp_path / "base", transposed=TRANSPOSED)
    merge(tmp_path / "base", tmp_path / "dense.safetensors", tmp_path / "out")
    assert max(difference(merged_outputs(tmp_path / "out"), outputs(model)).values()) <= 1e-6  # float32 weights, each rounded once


def test_the_other_axis_and_back(tmp_path: Path) -> None:
    """peft has no DoRA along inputs; at full rank there and back it is the same model."""
    layers = [name for name in TARGETS if not name[-1].isdigit()]
    model = wrap(new_base(tmp_path / "base", torch.float32), tmp_path / "dora", r=40, use_dora=True, target_modules=layers)
    options = {"base": tmp_path / "base", "transposed": TRANSPOSED, "rank": FULL}
    convert(tmp_path / "dora", tmp_path / "in.safetensors", magnitude_axis="in", format="loratools", **options)
    convert(tmp_path / "in.safetensors", tmp_path / "out", magnitude_axis="out", format="peft", **options)
    errors = difference(reloaded(tmp_path, tmp_path / "out", torch.float32), outputs(model))
    assert max(errors.values()) <= 5e-6, errors


@pytest.mark.parametrize("name", CASES)
def test_every_method_as_lora(tmp_path: Path, name: str) -> None:
    """At full rank nothing is left out, whatever the method: exact products, dense differences, and what only W tells of."""
    case = CASES[name]
    model = case.wrapped(tmp_path)
    options = {"base": tmp_path / "base", "transposed": case.transposed, "format": "loratools"}
    receipt = convert(tmp_path / "adapter", tmp_path / "lora.safetensors", kind="lora", rank=FULL, **options)
    assert {row["kind"] for row in receipt["tensors"]} <= {"lora", "full", "chain", "part", "stacked"}
    merge(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out")
    errors = difference(merged_outputs(tmp_path / "out"), outputs(model))
    assert max(errors.values()) <= case.tolerance, errors


# methods whose ΔW is a product of small factors; the others, and these two of them, are of full rank
PRODUCTS = ("adalora", "loha", "lokr", "delora", "gralora", "vera", "pvera", "vblora", "unilora", "tinylora", "miss")
DENSE = ("lokr, whole factors", "miss, bat")


@pytest.mark.parametrize("name", [name for name in CASES if name.split(",")[0] in PRODUCTS and name not in DENSE])
def test_products_load_in_peft_as_lora(tmp_path: Path, name: str) -> None:
    """Without --rank: each takes the rank that its product has."""
    case = CASES[name]
    model = case.wrapped(tmp_path)
    options = {"base": tmp_path / "base", "transposed": case.transposed, "embedding": ["table"]}  # no name that tells an embedding
    receipt = convert(tmp_path / "adapter", tmp_path / "lora", kind="lora", **options)
    assert all(row["optimal_error"] <= 1e-7 for row in receipt["tensors"])
    assert max(difference(reloaded(tmp_path, tmp_path / "lora", torch.float32), outputs(model)).values()) <= case.tolerance


@pytest.mark.parametrize("name", DENSE)
def test_without_a_small_product_a_rank_is_needed(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.wrapped(tmp_path)
    with pytest.raises(LoratoolsError, match=r"so it is approximated.*: expected --rank, --energy or --max-error"):
        convert(tmp_path / "adapter", tmp_path / "out", kind="lora", base=tmp_path / "base", transposed=case.transposed)


@pytest.mark.parametrize("name", CASES)
def test_every_method_in_loratools_own_format(tmp_path: Path, name: str) -> None:
    """Every kind of delta, with what its file left open, has words there: it merges to the same bytes."""
    case = CASES[name]
    case.wrapped(tmp_path)
    convert(tmp_path / "adapter", tmp_path / "own.safetensors", format="loratools")
    for source, out in ((tmp_path / "adapter", "one"), (tmp_path / "own.safetensors", "two")):
        merge(tmp_path / "base", source, tmp_path / out, transposed=case.transposed)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
