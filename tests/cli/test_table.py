"""Lines fit the terminal they are for, and in a pipe nothing is cut or broken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.cli._table import facts, table

CELLS = {
    "module": ["model.layers.{0..21}.self_attn.q_proj", "lm_head"],
    "kind": ["lora", "replacement"],
    "shape": ["2048 × 2048", "32000 × 2048"],
    "parameters": ["92,274,688", "65,536,000"],
}


def test_numbers_to_the_right_words_to_the_left() -> None:
    assert table(CELLS, None, words=("kind",)) == [
        "module                                 kind                shape  parameters",
        "model.layers.{0..21}.self_attn.q_proj  lora          2048 × 2048  92,274,688",
        "lm_head                                replacement  32000 × 2048  65,536,000",
    ]


def test_a_name_that_leaves_no_room_has_a_line_of_its_own() -> None:
    assert table(CELLS, 64, words=("kind",)) == [
        "module                     kind                shape  parameters",
        "model.layers.{0..21}.self_attn.q_proj",
        "                           lora          2048 × 2048  92,274,688",
        "lm_head                    replacement  32000 × 2048  65,536,000",
    ]


def test_where_most_names_leave_no_room_all_numbers_stand_below() -> None:
    cells = {"module": ["a.long.name.of.a.module"] * 3, "n": ["1", "2", "30"]}
    assert table(cells, 12) == ["module", "     n"] + [
        line for n in ("1", "2", "30") for line in ("a.long.name.of.a.module", f"    {n:>2}")
    ]


@given(st.lists(st.text("ab.", min_size=1, max_size=60), min_size=1, max_size=8), st.integers(40, 200))
def test_no_line_is_wider_than_the_terminal_but_a_names_own(names: list[str], columns: int) -> None:
    lines = table({"module": names, "parameters": ["1,000"] * len(names)}, columns)
    assert all(len(line) <= columns or line in names for line in lines)
    assert sum("1,000" in line for line in lines) == len(names)
    text = "\n".join(lines)
    assert all(name in text for name in names)


def test_facts_wrap_under_their_text() -> None:
    assert facts([("path", "a/" * 15), ("rank", "8")], 30) == ["path  " + "a/" * 12, "      " + "a/" * 3, "rank  8"]
    assert facts([("path", "x" * 500)], None) == ["path  " + "x" * 500]


@pytest.mark.parametrize("columns", [None, 20])
def test_empty_tables(columns: int | None) -> None:
    assert facts([], columns) == []
    assert table({"module": [], "n": []}, columns) == ["module  n"]
