"""Values of a config by type: what is none of its field's is gathered, and read as absent."""

from __future__ import annotations

from typing import Any

import pytest

from loratools.errors import LoratoolsError
from loratools.formats.peft_values import Values, finite, given, short

GOOD: dict[str, list[tuple[Any, Any]]] = {
    "flag": [(None, False), (True, True), (False, False)],
    "number": [(None, None), (3, 3.0), (-0.5, -0.5)],
    "rank": [(None, None), (4, 4)],
    "names": [(None, ()), ("q", ("q",)), (["q", "v"], ("q", "v"))],
    "target": [(None, None), ([], None), (["q"], ("q",)), (".*q", ".*q")],
    "layers": [(None, None), (3, (3,)), ([1, 2], (1, 2))],
}
BAD: dict[str, list[Any]] = {
    "flag": [1, "true", []], "number": ["3", True, float("nan"), [1]], "rank": [0, -1, 2.0, True, "4"],
    "names": [3, [3], {"q": 1}], "target": ["(", 3, [3]], "layers": ["1", [1.5], True, [True]],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "value", "expected"), [(kind, *pair) for kind, pairs in GOOD.items() for pair in pairs])
def test_good_values(kind: str, value: Any, expected: Any) -> None:
    faults: list[LoratoolsError] = []
    assert getattr(Values({"x": value}, faults), kind)("x") == expected and not faults


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in BAD.items() for value in values])
def test_bad_values_are_gathered_by_name(kind: str, value: Any) -> None:
    faults: list[LoratoolsError] = []
    assert not getattr(Values({"x": value}, faults), kind)("x")
    assert len(faults) == 1 and str(faults[0]).startswith("adapter_config.json: x")


def test_patterns() -> None:
    faults: list[LoratoolsError] = []
    values = Values({"ranks": {"q": 4}, "alphas": {"q": 0.5}, "wrong": {"q": 0.5}, "broken": {"(": 4}, "flags": {"(?i)q": 4}}, faults)
    assert values.patterns("ranks", whole=True) == {"q": 4} and values.patterns("alphas", whole=False) == {"q": 0.5} and not faults
    assert values.patterns("absent", whole=True) == values.patterns("wrong", whole=True) == values.patterns("broken", whole=True) == {}
    assert values.patterns("flags", whole=True) == {} and len(faults) == 3


@pytest.mark.parametrize(("value", "said"), [(None, False), (False, False), ("", False), ([], False), ({}, False), (0, True), (0.0, True)])
def test_what_says_something(value: Any, said: bool) -> None:
    assert given(value) is said


def test_small_things() -> None:
    assert len(short("x" * 99)) == 60 and short([1]) == "[1]"
    assert finite(1) and finite(0.5) and not finite(True) and not finite(float("inf")) and not finite("1")


def test_a_table_within_the_config() -> None:
    faults: list[LoratoolsError] = []
    inner = Values({"size": 0, "there": 3, "new": 1, "empty": None}, faults, "table.")
    assert (inner.needed("there"), inner.needed("lacking"), inner.needed("size")) == (3, 1, 1)
    inner.known("size", "there")
    assert [str(fault) for fault in faults] == [
        "adapter_config.json: table.lacking: found None, expected a whole number of at least 1",
        "adapter_config.json: table.size: found 0, expected a whole number of at least 1",
        "adapter_config.json sets table.new, which this version does not know; if it only matters in training, set it to null in "
        "adapter_config.json",
    ]
