"""loratools rescale: every module's scaling before and after, as a person and as a program reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli._adapters import llama_adapter, loratools


def test_the_scalings_are_shown(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", rank=2, lora_alpha=4)
    found = loratools("rescale", adapter, "-o", tmp_path / "out", "--alpha", 3)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert any(line.split() == ["held", "4", "of", "4", "deltas"] for line in lines)
    shown = [line.split() for line in lines if "q_proj" in line]
    assert shown == [["model.layers.{0,1}.self_attn.q_proj", "2", "4", "3", "2", "1.5", "1.33333"]]
    assert "rounding" in found.stdout and str(tmp_path / "out" / "loratools.json") in found.stdout


def test_json_is_the_receipt(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    found = loratools("rescale", adapter, "-o", tmp_path / "out", "--rslora", "--json")
    assert json.loads(found.stdout) == json.loads((tmp_path / "out" / "loratools.json").read_text())


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter")
    found = loratools("rescale", adapter, "-o", tmp_path / "out", "--by", 0)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("Error: --by: found 0.0, expected a finite number other than 0") and found.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "found"), [((), "none"), (("--alpha", 3, "--bake"), "--alpha and --bake")])
def test_no_way_and_two_ways_are_wrong_usage(tmp_path: Path, words: tuple[object, ...], found: str) -> None:
    told = loratools("rescale", llama_adapter(tmp_path / "adapter"), "-o", tmp_path / "out", *words)
    assert told.returncode == 2 and f"one of --alpha, --by, --bake, --rslora, --no-rslora is needed: found {found}" in told.stderr
    assert not (tmp_path / "out").exists()
