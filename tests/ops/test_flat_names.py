"""Adapters under flat names: only kohya is written under them, and they do not meet dotted ones but through a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import combine, compare, convert, resize
from loratools.errors import MatchError, NotExpressible
from loratools.formats import load
from tests.files import peft_config, write_adapter, write_checkpoint

A, B = torch.ones(2, 6), torch.ones(8, 2)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The same change under a kohya file's name and under peft's, and their base."""
    flat = tmp_path / "flat.safetensors"
    save_file({"lora_te_h_q.lora_down.weight": A, "lora_te_h_q.lora_up.weight": B, "lora_te_h_q.alpha": torch.tensor(2.0)}, flat)
    keys = {"base_model.model.h.q.lora_A.weight": A, "base_model.model.h.q.lora_B.weight": B}
    dotted = write_adapter(tmp_path / "dotted", keys, peft_config(r=2, lora_alpha=2, target_modules=["q"]))
    return {"flat": flat, "dotted": dotted, "base": write_checkpoint(tmp_path / "base", {"h.q.weight": torch.zeros(8, 6)})}


@pytest.mark.parametrize("format", ["peft", "loratools"])
def test_no_format_of_dotted_names_is_written_under_flat_names(files: dict[str, Path], tmp_path: Path, format: str) -> None:
    for operation, words in ((convert, {}), (resize, {"rank": 1})):
        with pytest.raises(NotExpressible, match=r"underscores where the model's have dots.*convert --base"):
            operation(files["flat"], tmp_path / "out", format=format, **words)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()
    resize(files["flat"], tmp_path / "out.safetensors", rank=1)  # kohya's own names are such
    assert list(load(tmp_path / "out.safetensors")) == list(load(files["flat"]))


def test_with_a_base_they_have_the_models_names(files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["flat"], tmp_path / "out", format="peft", base=files["base"])
    assert list(load(tmp_path / "out")) == ["h.q.weight"]


@pytest.mark.parametrize("order", [("flat", "dotted"), ("dotted", "flat")])
def test_they_meet_dotted_names_only_through_a_base(files: dict[str, Path], tmp_path: Path, order: tuple[str, str]) -> None:
    one, other = (files[name] for name in order)
    words: dict[str, Any] = {"match": "underscores where the others' have dots.*give --base"}
    with pytest.raises(MatchError, **words):
        compare(one, other)
    with pytest.raises(MatchError, **words):
        combine([one, other], tmp_path / "out")
    assert compare(one, other, base=files["base"])["total"]["cosine"] == pytest.approx(1)
    found = combine([one, other], tmp_path / "out", base=files["base"], format="peft")
    assert [row["name"] for row in found["tensors"]] == ["h.q.weight"]
    assert compare(files["flat"], files["flat"])["total"]["distance"] == pytest.approx(0, abs=1e-12)  # one spelling needs no base
