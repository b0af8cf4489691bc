"""loratools combine: weights after a colon, errors beside the best, what meets what on stderr."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli._adapters import llama_adapter, loratools


def test_a_sum_is_told(tmp_path: Path) -> None:
    one, other = llama_adapter(tmp_path / "one", rank=2), llama_adapter(tmp_path / "other", rank=1, layers=1)
    found = loratools("combine", f"{one}:0.7", f"{other}:-0.5", "-o", tmp_path / "out", "--rank", 2)
    assert found.returncode == 0, found.stderr
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines() if line]
    assert ["held", "6 of 6 deltas"] in lines and ["rank", "2–3 before, 2 now"] in lines
    assert found.stderr == "Note: 2 tensors are in 1 of the 2 adapters, 2 tensors are in 2 of the 2 adapters\n"
    assert json.loads((tmp_path / "out" / "loratools.json").read_text())["operation"] == "combine"


def test_an_unknown_method_names_those_there_are(tmp_path: Path) -> None:
    found = loratools("combine", llama_adapter(tmp_path / "one"), "-o", tmp_path / "out", "--method", "linear")
    assert found.returncode == 1
    assert found.stderr == "Error: unknown --method: found linear, expected sum\n"
