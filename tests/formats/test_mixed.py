"""DoRA beside plain LoRA: the error names both, and what it tells to do leads to a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools import convert
from loratools.adapter import Adapter
from loratools.deltas.dora import DoRA
from loratools.deltas.lowrank import LowRank
from loratools.errors import NotExpressible
from loratools.formats import load, save
from loratools.formats._mixed import mixed
from loratools.tensors import to_ref
from tests.files import write_checkpoint
from tests.strategies import randn

LAYER = "model.layers.0."


def low(seed: int) -> LowRank:
    return LowRank(A=to_ref(randn(2, 8, seed=seed)), B=to_ref(randn(6, 2, seed=seed + 1)), alpha=2.0, layer="linear")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base of three weights, and an adapter with DoRA on one of them."""
    write_checkpoint(tmp_path / "base", {f"{LAYER}{name}.weight": randn(6, 8, seed=10 + i) for i, name in enumerate("qkv")})
    dora = DoRA(direction=low(0), magnitude=to_ref(randn(6, 1, seed=5).abs() + 1))
    save(Adapter({f"{LAYER}q.weight": dora, f"{LAYER}k.weight": low(2), f"{LAYER}v.weight": low(4)}), tmp_path / "a", format="loratools")
    return tmp_path


@pytest.mark.parametrize("format", ["peft", "diffusers", "mlx"])
def test_both_are_named_and_the_ways_work(folder: Path, format: str) -> None:
    with pytest.raises(NotExpressible) as caught:
        convert(folder / "a", folder / "out", format=format)
    said = str(caught.value)
    assert f"DoRA on {LAYER}q.weight, plain LoRA on {LAYER}k.weight, {LAYER}v.weight" in said
    assert "convert --kind dora --base BASE" in said and "convert --kind lora --base BASE --rank R" in said
    receipt = convert(folder / "a", folder / "doras", format=format, kind="dora", base=folder / "base")
    assert {delta.kind for delta in load(folder / "doras").values()} == {"dora"}
    assert len(receipt["tensors"]) == 2 and all(row["error"] < 1e-6 for row in receipt["tensors"])  # of magnitudes in float32
    convert(folder / "a", folder / "loras", format=format, kind="lora", base=folder / "base", rank=2)
    assert {delta.kind for delta in load(folder / "loras").values()} == {"lora"}


def test_of_many_the_first_are_named() -> None:
    names = [f"x{number}" for number in range(5)]
    assert mixed(names, [], "all") == mixed([], names, "all") == []
    (error,) = mixed(names, ["y"], "all")
    assert error.fact == "all: DoRA on x0, x1, x2, … (5 in all), plain LoRA on y" and error.tensor == "y"
