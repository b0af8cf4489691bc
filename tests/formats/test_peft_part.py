"""What a row's `make` asks of a module: tensors that are there or are not, settings of the type they should have, patterns first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loratools.errors import LoratoolsError
from loratools.formats.peft_keys import Module
from loratools.formats.peft_part import Part
from loratools.tensors import to_ref

X = to_ref(torch.ones(2, 3))
CONFIG: dict[str, Any] = {
    "r": 4, "alpha": 1.5, "rank_pattern": {"^a\\.q": 2}, "alpha_pattern": {"q": 3}, "on": True, "places": [3, 0], "kind": "vector",
    "fed": ["q"], "by": "a\\..*", "size_pattern": {"q": 7},
}  # fmt: skip


def part(path: str = "a.q", **more: Any) -> Part:
    bank = Module({"shared": X}, {"shared": "base_model.shared"})
    return Part(path, Module({"A": X}, {"A": f"base_model.model.{path}.A"}), bank, CONFIG | more, (path,), ("size_pattern",))


def test_what_is_taken_is_remembered() -> None:
    asked = part()
    assert asked["A"] is X and asked.get("B") is None and asked.shared("shared") is X and not asked.has_shared("B")
    assert asked.used == {"A", "B"} and asked.banked == {"shared"} and asked.slots() == ["A"]


def test_a_pattern_goes_before_the_setting() -> None:
    assert (part().whole("r", pattern="rank_pattern"), part("b.q").whole("r", pattern="rank_pattern")) == (2, 4)
    assert (part().number("alpha", pattern="alpha_pattern"), part().number("alpha")) == (3.0, 1.5)
    assert part().rank("r", 2) == 2 and part().rank("r", 4, pattern=None) == 4
    assert part().whole("size", pattern="size_pattern") == 7  # behind a dot, by the older rule
    with pytest.raises(LoratoolsError, match="lacks size"):
        part("xq").whole("size", pattern="size_pattern")


def test_settings_of_every_type() -> None:
    asked = part()
    assert asked.flag("on") and asked.flag("off", False) is False and asked.naturals("places") == (3, 0)
    assert asked.word("kind", "lora", "vector") == "vector"
    assert asked.listed("fed") and asked.listed("by") and not part("q").listed("by")


FAULTS: dict[str, tuple[Callable[[Part], Any], str]] = {
    "no tensor": (lambda one: one["B"], r"base_model\.model\.a\.q\.A: has no B beside it"),
    "no shared tensor": (lambda one: one.shared("bank"), r"the file has no base_model\.bank"),
    "no number": (lambda one: one.number("kind"), "kind: found 'vector', expected a number"),
    "no whole number": (lambda one: one.whole("alpha"), "alpha: found 1.5, expected a whole number"),
    "another rank": (lambda one: one.rank("r", 3), "the rank is not the config's: found 3, expected 2"),
    "no list": (lambda one: one.naturals("r"), "r: found 4, expected a list of whole numbers from 0 up"),
    "no flag": (lambda one: one.flag("r"), "r: found 4, expected true or false"),
    "another word": (lambda one: one.word("kind", "lora"), "kind: found 'vector', expected lora"),
    "no table of patterns": (lambda one: one.whole("r", pattern="places"), r"places: found \[3, 0\], expected regular expressions"),
    "nothing said": (lambda one: one.whole("none"), "adapter_config.json lacks none"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_there_or_no_such_value(fault: str) -> None:
    ask, said = FAULTS[fault]
    with pytest.raises(LoratoolsError, match=said):
        ask(part())
