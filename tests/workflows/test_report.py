"""report: one file that loads nothing, its data escaped, the same bytes each time; the vendored charts are those recorded."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from loratools.errors import FormatError, OptionError, OutputError
from loratools.workflows._report.page import CHARTS, embedded, page
from loratools.workflows.report import report
from tests.cli._adapters import llama_adapter
from tests.files import peft_config, write_adapter

EVIL = "</script><script>alert(1)</script>\u2028&"


def data_of(path: Path) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_holds_the_norms_and_is_the_same_each_time(tmp_path: Path, base: Path) -> None:
    one, other = llama_adapter(tmp_path / "one"), llama_adapter(tmp_path / "other", rank=3)
    for name in ("a.html", "b.html"):
        report([one, other], tmp_path / name, base=base)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    data = data_of(tmp_path / "a.html")
    row = data["adapters"][0]["modules"][0]
    assert row["norm"] == pytest.approx(sum(value**2 for value in row["sigma"]) ** 0.5, rel=1e-3)  # 4 digits in the page
    assert row["share"] == pytest.approx(row["norm"] / row["weight"], rel=1e-3)
    assert len(data["pairs"][0]["modules"]) == 4 and data["adapters"][0]["findings"]


def test_four_hundred_modules_are_within_two_megabytes_and_name_no_network(tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    report(llama_adapter(tmp_path / "one", rank=8, layers=200), out)
    assert len(data_of(out)["names"]) == 400
    assert out.stat().st_size <= 2_000_000
    assert set(re.findall(r"https?://[^/\"'\s]+", out.read_text())) <= {"http://www.w3.org"}  # XML's names of SVG


def test_what_would_end_the_script_is_text() -> None:
    text = embedded({EVIL: [EVIL, 0.123456, float("nan")]})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {EVIL: [EVIL, 0.1235, None]}
    assert "<title>&lt;b&gt;@@data@@</title>" in page({}, "<b>@@data@@")


def test_a_module_named_script_is_only_data(tmp_path: Path) -> None:
    root = "base_model.model.<script>alert(1)</script>"
    tensors = {f"{root}.lora_A.weight": torch.ones(2, 4), f"{root}.lora_B.weight": torch.ones(3, 2)}
    report(write_adapter(tmp_path / "a", tensors, peft_config(target_modules=["<script>alert(1)</script>"])), tmp_path / "r.html")
    assert "<script>alert" not in (tmp_path / "r.html").read_text()
    assert data_of(tmp_path / "r.html")["names"] == ["<script>alert(1)</script>.weight"]


def test_what_is_refused_leaves_nothing(tmp_path: Path, base: Path) -> None:
    one, out = llama_adapter(tmp_path / "one"), tmp_path / "r.html"
    with pytest.raises(OptionError, match="one adapter or more"):
        report([], out)
    with pytest.raises(OptionError, match="given twice"):
        report([one, one], out)
    with pytest.raises(FormatError, match="this is a checkpoint"):
        report([one, base], out)
    with pytest.raises(FormatError, match="no such file"):
        report([tmp_path / "none"], out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        report(one, out)
    assert out.read_text() == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptionError, match="a report is one file"):
        report(one, tmp_path / "folder")


def test_the_charts_are_those_recorded() -> None:
    told = (CHARTS.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(CHARTS.read_bytes()).hexdigest() in told
    assert {"LICENSE", "NOTICE", "LICENSE.zrender", "LICENSE.tslib", "LICENSE.d3"} <= {path.name for path in CHARTS.parent.iterdir()}
    assert CHARTS.stat().st_size < 1_000_000 and b"</script" not in CHARTS.read_bytes().lower()
