"""loratools resize: ranks before and after, errors beside the best."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli._adapters import llama_adapter, loratools


def test_ranks_and_errors_are_shown(tmp_path: Path) -> None:
    adapter = llama_adapter(tmp_path / "adapter", rank=4)
    found = loratools("resize", adapter, "-o", tmp_path / "out", "--rank", 2)
    assert found.returncode == 0, found.stderr
    lines = [line.split(maxsplit=1) for line in found.stdout.splitlines() if line]
    assert ["rank", "4 before, 2 now"] in lines and ["held", "4 of 4 deltas"] in lines
    receipt = json.loads((tmp_path / "out" / "loratools.json").read_text())
    worst = max(receipt["tensors"], key=lambda row: row["error"])
    shown = next(line for line in lines if line[0] == worst["name"].removesuffix(".weight"))
    assert shown[1].split()[:4] == ["4", "2", f"{worst['error']:.4g}", f"{worst['optimal_error']:.4g}"]


def test_a_fault_names_the_option(tmp_path: Path) -> None:
    found = loratools("resize", llama_adapter(tmp_path / "adapter"), "-o", tmp_path / "out", "--size", "1kB")
    assert (found.returncode, found.stdout) == (1, "")
    assert "--size is too small" in found.stderr and not (tmp_path / "out").exists()
