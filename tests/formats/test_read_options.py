"""The words by which a user says what an adapter's file leaves open: parsed, refused, and spoken on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from loratools.cli import cli
from loratools.errors import OptionError
from loratools.formats.base import ReadOptions, read_options


def test_words_become_options() -> None:
    words = {
        "alpha_in": 8,
        "scale": "alpha/r",
        "scratch_dora": "merged",
        "enable_lora": "1,0,1",
        "conv": ["a=b.*=3"],
        "transposed": ["c_*"],
    }
    expected = ReadOptions(
        alpha=8, transposed=("c_*",), scale="alpha/r", scratch_dora="merged", enable_lora=(True, False, True), kernels=(("a=b.*", 3),)
    )
    assert read_options(words) == expected
    assert read_options({}) == read_options({"alpha_in": None, "conv": []}) == ReadOptions()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("scale", "alpha*r"),
        ("scratch_dora", "column"),
        ("enable_lora", "1,2"),
        ("enable_lora", ""),
        ("conv", ["x"]),
        ("conv", ["x=0"]),
        ("conv", ["=3"]),
        ("alpha_in", float("nan")),
        ("alpha_in", float("-inf")),
    ],
)
def test_what_is_no_such_word_is_refused(word: str, value: object) -> None:
    with pytest.raises(OptionError, match=f"--{word.replace('_', '-')}.*expected"):
        read_options({word: value})


def test_the_command_line_passes_them_on(tmp_path: Path) -> None:
    factors = {"layers.0.lora.A": torch.ones(4, 2), "layers.0.lora.B": torch.ones(2, 3)}
    save_file({**factors, "layers.0.linear.weight": torch.ones(3, 4)}, tmp_path / "tutorial.safetensors")
    for scale, expected in (("alpha", 8.0), ("alpha/r", 4.0)):
        words = ["inspect", str(tmp_path / "tutorial.safetensors"), "--alpha-in", "8", "--scale", scale, "--json"]
        found = CliRunner().invoke(cli, words)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)["modules"][0]["scaling"] == expected
