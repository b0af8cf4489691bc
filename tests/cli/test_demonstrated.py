"""The demo's result as lines; that the whole command prints what the README shows is tests/test_readme.py's."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.cli._demonstrated import demonstrated

ROW = {"accuracy": 0.5, "bytes": 1500, "error": None, "optimal_error": None, "applied": None, "expected": None}


def result(**more: Any) -> dict[str, Any]:
    """What the demo gives for two tensors at rank 8, one of them saved whole, one that no merge could measure."""
    extracted = [
        {"name": "fc.weight", "relative_norm": 0.25, "rank": 8, "error": 0.5, "optimal_error": 0.4375},
        {"name": "fc.bias", "relative_norm": None, "rank": None, "error": 0.0, "optimal_error": 0.0},
    ]
    merged = [{"name": "fc.bias", "survived": None}, {"name": "fc.weight", "survived": 0.75}]
    return {
        "task": "a task", "parameters": 1234, "images": {"learnt_from": 20, "held_out": 10}, "kept": None, "seconds": 3.4,
        "rows": [ROW | {"name": "base"}, ROW | {"name": "rank 8", "error": 0.5, "optimal_error": 0.25, "applied": 1, "expected": 2}],
        "extract": {"arguments": {"rank": 8}, "tensors": extracted, "left_out": [{"name": "x"}]},
        "merge": {"tensors": merged, "left_out": [], "applied": 1, "expected": 2, "digests": {"fc.weight": "", "fc.bias": ""}},
    } | more  # fmt: skip


def test_every_number_stands_where_it_belongs() -> None:
    lines = [line.split() for line in demonstrated(result(), None)]
    assert ["base", "50.00", "%", "1.50", "kB", "–", "–", "–"] in lines
    assert ["rank", "8", "50.00", "%", "1.50", "kB", "0.5", "0.25", "1/2"] in lines
    assert ["fc.weight", "0.25", "rank", "8", "0.5", "0.4375", "75.00", "%"] in lines
    assert ["fc.bias", "–", "whole", "0", "0", "–"] in lines
    assert ["applied", "1", "of", "2", "changes", "at", "rank", "8,", "1", "left", "out"] in lines


@pytest.mark.parametrize(("kept", "told"), [("here/", "here/"), (None, "--keep DIR")])
def test_it_says_where_the_files_are(kept: str | None, told: str) -> None:
    (line,) = [line for line in demonstrated(result(kept=kept), None) if line.startswith("kept")]
    assert told in line
