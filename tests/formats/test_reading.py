"""The words of reading: one table for every function that takes them, at their defaults, refused where there is no such word."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.formats.base import ReadOptions, read_options
from loratools.formats.reading import DEFAULTS, Reading, arguments, reads

READERS = ("merge", "inspect", "rescale", "resize", "combine", "compare", "convert")


@reads
def told(path: str, *, rank: int = 1, **reading: Unpack[Reading]) -> dict[str, Any]:
    """As the functions that read adapters are."""
    return arguments(locals(), "path")


def test_words_that_are_not_given_have_their_defaults() -> None:
    assert told("x") == {"rank": 1, **DEFAULTS}
    assert told("x", alpha_in=8, conv=["a=3"]) == {"rank": 1, **DEFAULTS, "alpha_in": 8, "conv": ["a=3"]}
    assert read_options(dict(DEFAULTS)) == ReadOptions()
    assert set(DEFAULTS) == set(Reading.__annotations__)


def test_a_word_that_there_is_not_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="alfa_in"):
        told("x", alfa_in=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="path"):
        told(rank=2)  # type: ignore[call-arg]
    assert told.__name__ == "told" and told.__doc__ == "As the functions that read adapters are."


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_all_the_words(name: str) -> None:
    function: Callable[..., Any] = getattr(loratools, name)
    words = list(inspect.signature(function).parameters.values())
    found = {word.name: word for word in words if word.kind is word.KEYWORD_ONLY}
    assert {word: found[word].default for word in DEFAULTS} == dict(DEFAULTS)
    with pytest.raises(TypeError, match="alpha_inn"):
        function(*["x"] * (len(words) - len(found)), alpha_inn=1)


def test_no_reader_defines_them_itself() -> None:
    """A function that takes one of these words and not by the one mechanism would soon lack another."""
    for path in (Path(loratools.__file__).parent / "ops").glob("*.py"):
        assert "alpha_in:" not in path.read_text(), path


def tutorial(folder: Path) -> Path:
    save_file({"q.lora.A": torch.ones(4, 2), "q.lora.B": torch.ones(2, 4)}, folder / "tutorial.safetensors")
    return folder / "tutorial.safetensors"


@pytest.mark.parametrize(("scale", "scaling"), [("alpha", 8.0), ("alpha/r", 4.0)])
def test_each_operation_reads_what_the_words_say(tmp_path: Path, scale: str, scaling: float) -> None:
    path, words = tutorial(tmp_path), {"alpha_in": 8.0, "scale": scale}
    done = {
        "rescale": loratools.rescale(path, tmp_path / "rescale", by=1.0, format="peft", **words),  # type: ignore[arg-type]
        "resize": loratools.resize(path, tmp_path / "resize", rank=1, format="peft", **words),  # type: ignore[arg-type]
        "combine": loratools.combine([path], tmp_path / "combine", format="peft", **words),  # type: ignore[arg-type]
        "convert": loratools.convert(path, tmp_path / "convert", format="peft", **words),  # type: ignore[arg-type]
    }
    for name, receipt in done.items():
        assert receipt["arguments"]["alpha_in"] == 8 and receipt["arguments"]["scale"] == scale
        (row,) = loratools.inspect(tmp_path / name)["modules"]
        assert row["scaling"] == pytest.approx(scaling), name
