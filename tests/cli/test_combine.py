"""loratools combine: weights after a colon, errors beside the best, what meets what on stderr, wrong usage told before work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratools.cli._algebra import combined
from tests.cli._adapters import llama_adapter, loratools


def test_a_sum_is_told(tmp_path: Path) -> None:
    one, other = llama_adapter(tmp_path / "one", rank=2), llama_adapter(tmp_path / "other", rank=1, layers=1)
    found = loratools("combine", f"{one}:0.7", f"{other}:-0.5", "-o", tmp_path / "out", "--rank", 2)
    assert found.returncode == 0, found.stderr
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines() if line]
    assert ["held", "6 of 6 deltas"] in lines and ["rank", "2–3 before, 2 now"] in lines
    meeting, mixed = found.stderr.splitlines()
    assert meeting == "Note: 2 tensors are in 1 of the 2 adapters, 2 tensors are in 2 of the 2 adapters"
    assert mixed == "Note: mixed: ranks 2 (4), 1 (2)"
    assert json.loads((tmp_path / "out" / "loratools.json").read_text())["operation"] == "combine"


def test_a_method_and_its_options_reach_the_receipt(tmp_path: Path) -> None:
    one, other = llama_adapter(tmp_path / "one"), llama_adapter(tmp_path / "other", lora_alpha=9)
    words = ("--method", "dare-ties", "--density", 0.5, "--rank", 3)
    found = loratools("combine", one, other, "-o", tmp_path / "out", *words, "--json")
    assert found.returncode == 0, found.stderr
    receipt = json.loads(found.stdout)
    told = {word: receipt["arguments"][word] for word in ("method", "density", "majority_sign", "seed", "epsilon", "rank", "base")}
    expected = {"method": "dare-ties", "density": 0.5, "majority_sign": "total", "seed": 0, "epsilon": None, "rank": 3, "base": None}
    assert told == expected
    assert {row["rank"] for row in receipt["tensors"]} == {3} and all(row["error"] > 0.01 for row in receipt["tensors"])


WRONG = {
    "--method linear": "unknown --method: found linear, expected sum or ties or dare-linear or dare-ties or magnitude-prune or della",
    "--density 0.5": "--density has no meaning for --method sum: found 0.5",
    "--method ties --density 0.5": "--method ties needs one way to choose ranks: found none, expected --rank, --energy or --max-error",
    "--method ties --rank 2": "--method ties needs --density, the share of each change that stays",
    "--method ties --rank 2 --density 0.5 --seed 1": "--seed has no meaning for --method ties: found 1",
    "--method dare-linear --rank 2 --density 0.5 --majority-sign total": "--majority-sign has no meaning for --method dare-linear",
    "--rank 2 --energy 0.5": "at most one way to choose ranks: found --rank and --energy",
    "--energy 0": "--energy: found 0.0, expected more than 0, at most 1",
    "--max-error 1": "--max-error: found 1.0, expected between 0 and 1",
    "--method ties --rank 2 --density 1.5": "--density: found 1.5, expected more than 0, at most 1",
    "--method ties --rank 2 --density 0.5 --majority-sign most": "--majority-sign: found most, expected total or frequency",
    "--method della --rank 2 --density 0.1": "--density: found 0.1 ± 0.15, expected between 0 and 1 with --epsilon added",
    "--method della --rank 2 --density 0.5 --epsilon 0.7": "--epsilon: found 0.7, expected at least 0, less than 0.5",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_has_no_meaning_is_wrong_usage(tmp_path: Path, words: str) -> None:
    found = loratools("combine", tmp_path / "no such adapter", "-o", tmp_path / "out", *words.split())
    assert found.returncode == 2 and not (tmp_path / "out").exists()
    assert WRONG[words] in found.stderr.replace("\n", " "), found.stderr


def test_a_sum_of_no_stated_rank_has_a_summary(tmp_path: Path) -> None:
    row = {"name": "a.weight", "rank_before": None, "rank": 7, "error": 0.0, "optimal_error": 0.0, "share": 1.0}
    receipt = {"tensors": [row], "applied": 3, "expected": 3, "outputs": [], "seconds": 0.0}
    told = combined(receipt, str(tmp_path / "out"), None)
    assert "rank      7 now" in told and told[-1].split() == ["a", "–", "7", "0", "0", "100", "%"]
    both = combined(receipt | {"tensors": [row, row | {"name": "b.weight", "rank_before": 3}]}, str(tmp_path / "out"), None)
    assert "rank      3 before, 7 now" in both
