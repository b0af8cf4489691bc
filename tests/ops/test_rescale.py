"""rescale: ΔW stays or is multiplied, exactly for powers of two; options that contradict each other; what cannot be rescaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import NonFiniteError, OptionError, UnsupportedError
from loratools.formats import load
from loratools.ops.merge import merge
from loratools.ops.rescale import rescale
from loratools.ops.verify import verify
from loratools.tensors import read_tensor, to_ref
from tests.files import peft_config, raw, read_adapter, read_checkpoint, write_adapter, write_checkpoint
from tests.ops._lora import adapters, checked, dense, low, rows_of

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
NAME = "h.0.up.weight"


@pytest.fixture
def adapter() -> Adapter:
    return Adapter(deltas={NAME: low((20, 7), 3, 0, alpha=12.0), "h.0.down.weight": low((3, 20), 5, 1, alpha=12.0)})


def same_function(one: Adapter, other: Adapter, by: float = 1.0, unit: float = 0.0) -> None:
    assert set(one) == set(other)
    for name in one:
        before, after = by * dense(one[name]), dense(other[name])
        delta = one[name]
        assert isinstance(delta, LowRank)
        B, A = (read_tensor(ref, torch.float64).flatten(1).abs() for ref in (delta.B, delta.A))
        # each of B's elements is off by `unit` of itself, and float64 sums by a few 1e-16
        assert bool(((after - before).abs() <= (unit + 1e-14) * abs(by * delta.scaling) * (B @ A)).all())


@settings(max_examples=25)
@given(
    adapters(dtypes=(torch.float32, torch.bfloat16, torch.float64)),
    st.sampled_from([1.0, 0.7, 16.0, 3.0]),
    st.sampled_from([None, True, False]),
)
def test_an_alpha_keeps_the_function(tmp_path_factory: pytest.TempPathFactory, given: Adapter, alpha: float, flag: bool | None) -> None:
    out = tmp_path_factory.mktemp("a") / "out"
    receipt = checked(rescale(given, out, alpha=alpha, rslora=flag), out)
    found = load(out)
    same_function(given, found, unit=2.0**-8)
    assert {delta.alpha for delta in found.values() if isinstance(delta, LowRank)} == {alpha}
    for name, row in rows_of(receipt).items():
        moved = float((dense(found[name]) - dense(given[name])).norm())
        # the error stated is that of the factors on disk; float64's own noise is 1e-14 of ‖ΔW‖ at most where nothing cancels
        assert moved == pytest.approx(
            row["error"] * float(dense(given[name]).norm()), rel=1e-3, abs=1e-13 * float(dense(given[name]).norm())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_powers_of_two_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    given = Adapter(deltas={NAME: low((20, 7), 3, 0, alpha=12.0, dtype=dtype)})
    receipt = checked(rescale(given, tmp_path / "out", alpha=48), tmp_path / "out")
    (row,) = receipt["tensors"]
    assert (row["factor"], row["error"], row["scaling_before"], row["scaling"]) == (0.25, 0.0, 4.0, 16.0)
    assert torch.equal(dense(load(tmp_path / "out")[NAME]), dense(given[NAME]))


@settings(max_examples=15)
@given(adapters(dtypes=(torch.float32, torch.float16)), st.sampled_from([0.5, -1.0, 1.7]), st.sampled_from([None, True, False]))
def test_by_multiplies_the_function_and_keeps_the_factors(
    tmp_path_factory: pytest.TempPathFactory, given: Adapter, by: float, flag: bool | None
) -> None:
    out = tmp_path_factory.mktemp("by") / "out"
    receipt = checked(rescale(given, out, by=by, rslora=flag), out)
    found = load(out)
    same_function(given, found, by)
    for name, row in rows_of(receipt).items():
        one, other = given[name], found[name]
        assert isinstance(one, LowRank) and isinstance(other, LowRank)
        assert raw(read_tensor(one.B)) == raw(read_tensor(other.B)) and raw(read_tensor(one.A)) == raw(read_tensor(other.A))
        assert row["scaling"] == pytest.approx(by * row["scaling_before"], rel=1e-15) and row["factor"] == 1


@pytest.mark.parametrize("flag", [True, False])
def test_the_flag_alone_keeps_function_and_factors(tmp_path: Path, adapter: Adapter, flag: bool) -> None:
    rescale(adapter, tmp_path / "out", rslora=flag)
    found = load(tmp_path / "out")
    same_function(adapter, found)
    assert read_adapter(tmp_path / "out")[1]["use_rslora"] is flag


@settings(max_examples=15)
@given(adapters())
def test_bake_leaves_nothing_but_factors(tmp_path_factory: pytest.TempPathFactory, given: Adapter) -> None:
    out = tmp_path_factory.mktemp("bake") / "out"
    rescale(given, out, bake=True)
    found = load(out)
    same_function(given, found, unit=2.0**-24)
    for delta in found.values():
        assert isinstance(delta, LowRank)
        assert (delta.scaling, delta.alpha, delta.rslora) == (1.0, delta.rank, False)


def test_baked_adapters_of_one_rank_have_no_patterns(tmp_path: Path) -> None:
    rescale(
        Adapter(deltas={name: low((12, 12), 4, 0, alpha=alpha) for name, alpha in (("a.weight", 3.0), ("b.weight", 5.0))}),
        tmp_path / "o",
        bake=True,
    )
    config = read_adapter(tmp_path / "o")[1]
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"], config["rank_pattern"]) == (4, 4, {}, {})


def test_a_merge_of_the_rescaled_is_the_merge(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {NAME: torch.randn(20, 7, generator=torch.Generator().manual_seed(3))})
    generator = torch.Generator().manual_seed(4)
    shapes = {"A": (2, 7), "B": (20, 2)}
    tensors = {f"base_model.model.h.0.up.lora_{X}.weight": torch.randn(shape, generator=generator) for X, shape in shapes.items()}
    given = write_adapter(tmp_path / "given", tensors, peft_config(target_modules=["up"]))
    receipt = checked(rescale(given, tmp_path / "out", alpha=32, sha256=True), tmp_path / "out")
    assert [row["role"] for row in receipt["inputs"]] == ["adapter", "adapter"] and receipt["inputs"][0]["sha256"]
    merge(base, given, tmp_path / "one")
    merge(base, tmp_path / "out", tmp_path / "two")
    assert raw(read_checkpoint(tmp_path / "one")[NAME]) == raw(read_checkpoint(tmp_path / "two")[NAME])
    assert verify(tmp_path / "out")["ok"]
    again = rescale(tmp_path / "out", tmp_path / "again", by=2)
    assert [entry["operation"] for entry in again["history"]] == ["rescale"]


def with_bias(**more: Any) -> Adapter:
    weight = low((20, 7), 3, 0, alpha=12.0)
    return Adapter(deltas={NAME: weight, "h.0.up.bias": Full(diff=to_ref(torch.arange(20.0)), scale=weight.scaling), **more})


@pytest.mark.parametrize(("options", "by"), [({"alpha": 5.0}, 1.0), ({"by": 0.3}, 0.3), ({"bake": True}, 1.0), ({"rslora": True}, 1.0)])
def test_a_bias_goes_with_its_module(tmp_path: Path, options: dict[str, Any], by: float) -> None:
    receipt = checked(rescale(with_bias(), tmp_path / "out", **options), tmp_path / "out")
    found = load(tmp_path / "out")
    for name in ("h.0.up.bias", NAME):
        wanted = by * dense(with_bias()[name])
        # one rounding to float32, 6e-8 of each term; a sum of three terms is as large as the greatest element or so
        assert float((dense(found[name]) - wanted).abs().max()) <= 2e-7 * float(wanted.abs().max())
    assert receipt["applied"] == receipt["expected"] == 2 == len(receipt["tensors"])


def test_dora_keeps_its_magnitude_and_function(tmp_path: Path) -> None:
    magnitude = torch.rand(20, 1, generator=torch.Generator().manual_seed(0)) + 1
    given = Adapter(deltas={NAME: DoRA(direction=low((20, 7), 3, 0, alpha=12.0), magnitude=to_ref(magnitude))})
    rescale(given, tmp_path / "out", alpha=3)
    found = load(tmp_path / "out")[NAME]
    assert isinstance(found, DoRA)
    assert torch.equal(dense(found), dense(given[NAME]))
    assert torch.equal(read_tensor(found.magnitude), magnitude)
    with pytest.raises(UnsupportedError, match=r"h\.0\.up\.weight: --by on a DoRA delta"):
        rescale(given, tmp_path / "two", by=2)
    assert not (tmp_path / "two").exists()


def test_saved_tensors_are_kept_or_refused(tmp_path: Path) -> None:
    saved = torch.randn(4, 7)
    given = with_bias(**{"head.weight": Replacement(value=to_ref(saved))})
    receipt = checked(rescale(given, tmp_path / "out", alpha=3), tmp_path / "out")
    found = load(tmp_path / "out")["head.weight"]
    assert isinstance(found, Replacement) and torch.equal(read_tensor(found.value), saved)
    assert receipt["applied"] == receipt["expected"] == 3
    with pytest.raises(UnsupportedError, match=r"head\.weight: --by on a replacement"):
        rescale(given, tmp_path / "two", by=2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 1, "by": 2},
        {"alpha": 1, "bake": True},
        {"bake": True, "rslora": True},
        {"by": 0},
        {"by": float("inf")},
        {"alpha": 0},
        {"alpha": -1},
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, adapter: Adapter, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        rescale(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_factor_that_overflows(tmp_path: Path) -> None:
    given = Adapter(deltas={NAME: low((20, 7), 3, 0, alpha=12.0, dtype=torch.float16)})
    with pytest.raises(NonFiniteError, match=r"h\.0\.up\.weight"):
        rescale(given, tmp_path / "out", alpha=1e-6)
    assert not (tmp_path / "out").exists()


def test_a_factor_that_is_not_finite_is_named_with_its_file(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.up.lora_A.weight": torch.ones(2, 7),
        "base_model.model.up.lora_B.weight": torch.full((20, 2), float("nan")),
    }
    path, out = write_adapter(tmp_path / "given", tensors, peft_config(target_modules=["up"])), tmp_path / "out"
    with pytest.raises(NonFiniteError, match=r"adapter_model\.safetensors: up\.weight: a factor holds inf or nan"):
        rescale(path, out, alpha=3)
    assert not out.exists()
