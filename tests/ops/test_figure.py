"""What pictures share: which files are refused before work, and what is said without matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loratools.adapter import Adapter
from loratools.errors import MissingExtra, OutputError, UsageError
from loratools.ops import _figure
from loratools.ops.compare import compare
from tests.ops._lora import low

NAME = "model.layers.0.q.weight"


def test_another_ending_and_an_input_in_its_place(tmp_path: Path) -> None:
    one = Adapter(deltas={NAME: low((20, 7), 2, 0)})
    with pytest.raises(UsageError, match=r"--plot: found both\.jpg, expected a name that ends in \.png or \.svg or \.pdf"):
        compare(one, one, plot=tmp_path / "both.jpg")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(OutputError, match="is, holds or lies inside the input"):
        _figure.checked(tmp_path / "adapter" / "p.png", [tmp_path / "adapter"])
    with pytest.raises(UsageError, match=r"--plot: found .*, expected a file that is not the output or in it"):
        _figure.checked(tmp_path / "out" / "p.png", out=tmp_path / "out")
    (tmp_path / "old.png").write_text("an earlier one")
    compare(one, one, plot=tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    one = Adapter(deltas={NAME: low((20, 7), 2, 0)})
    with pytest.raises(MissingExtra) as caught:
        compare(one, one, plot=tmp_path / "p.png")
    assert str(caught.value) == '--plot draws with matplotlib, which is not installed; pip install "loratools[plot]"'
    assert compare(one, one)["total"]["cosine"] == pytest.approx(1)  # and nothing else needs it
