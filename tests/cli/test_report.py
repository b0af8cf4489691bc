"""loratools report: the page of one adapter and of several, what it says, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.cli._adapters import llama_adapter, loratools


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    told: dict[str, Any] = json.loads(found[1])
    return told


def test_one_adapter(tmp_path: Path) -> None:
    adapter, out = llama_adapter(tmp_path / "style"), tmp_path / "r.html"
    found = loratools("report", adapter, "-o", out)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"{out}: 4 modules of style\n"
    data = data_of(out)
    assert [one["label"] for one in data["adapters"]] == ["style"] and data["base"] is None and data["pairs"] == []


def test_several_with_a_base(tmp_path: Path, base: Path) -> None:
    one, other, out = llama_adapter(tmp_path / "one"), llama_adapter(tmp_path / "other", rank=3), tmp_path / "r.html"
    found = loratools("report", one, other, "--base", base, "-o", out, "--threads", 2)
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{out}: 4 modules of one, other\n"
    data = data_of(out)
    assert data["base"] == str(base) and len(data["pairs"]) == 1
    assert all(row["share"] > 0 for adapter in data["adapters"] for row in adapter["modules"])


def test_what_is_there_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    adapter, out = llama_adapter(tmp_path / "style"), tmp_path / "r.html"
    out.write_text("mine")
    found = loratools("report", adapter, "-o", out)
    assert found.returncode == 1 and "exists already" in found.stderr and out.read_text() == "mine"
    assert loratools("report", adapter, "-o", out, "--overwrite").returncode == 0
    assert data_of(out)["names"]


def test_a_checkpoint_and_nothing_at_all_are_refused(tmp_path: Path, base: Path) -> None:
    out = tmp_path / "r.html"
    found = loratools("report", base, "-o", out)
    assert found.returncode == 1 and "a report is of adapters, and this is a checkpoint" in found.stderr and "--base" in found.stderr
    assert loratools("report", "-o", out).returncode == 2
    assert loratools("report", llama_adapter(tmp_path / "style")).returncode == 2
    assert not out.exists()
