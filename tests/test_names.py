"""Names of repeated layers drawn together stand for exactly their names."""

from __future__ import annotations

import re
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from loratools.names import grouped, natural

PARTS = st.lists(st.sampled_from(["h", "0", "1", "2", "3", "7", "10", "01", "q", "attn"]), min_size=1, max_size=4)
NAMES = st.lists(PARTS.map(".".join) | PARTS.map("_".join), unique=True, max_size=30)


def spelt_out(pattern: str) -> list[str]:
    """The names a pattern stands for, written apart from the code under test."""
    parts = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if not piece.startswith("{"):
            parts.append([piece])
            continue
        choices = []
        for run in piece[1:-1].split(","):
            first, _, last = run.partition("..")
            choices += [str(number) for number in range(int(first), int(last or first) + 1)]
        parts.append(choices)
    return ["".join(choice) for choice in product(*parts)]


@given(NAMES)
def test_a_pattern_stands_for_exactly_its_names(names: list[str]) -> None:
    rows = grouped(names)
    for pattern, members in rows:
        assert sorted(spelt_out(pattern)) == sorted(members)
    assert sorted(member for _, members in rows for member in members) == sorted(names)


@given(NAMES, st.randoms())
def test_only_names_of_equal_key_share_a_pattern(names: list[str], random: object) -> None:
    keys = {name: hash(name) % 2 for name in names}
    assert all(len({keys[member] for member in members}) == 1 for _, members in grouped(names, keys))


def test_layers_with_gaps() -> None:
    assert [pattern for pattern, _ in grouped([f"m.{i}.q" for i in (0, 1, 2, 3, 5, 7, 8)])] == ["m.{0..3,5,7,8}.q"]


def test_two_numbers_of_which_not_all_pairs_are_there() -> None:
    names = [f"stages.{stage}.blocks.{block}" for stage, blocks in ((0, 3), (1, 3), (2, 9)) for block in range(blocks)]
    assert [pattern for pattern, _ in grouped(names)] == ["stages.{0,1}.blocks.{0..2}", "stages.2.blocks.{0..8}"]


def test_one_layer_alone_keeps_its_name() -> None:
    assert grouped(["model.layers.4.q", "lm_head"]) == [("model.layers.4.q", ["model.layers.4.q"]), ("lm_head", ["lm_head"])]


def test_natural_order() -> None:
    assert sorted(["l.10.a", "l.2.b", "l.2.a", "l.weight"], key=natural) == ["l.weight", "l.2.a", "l.2.b", "l.10.a"]


def test_names_whose_dots_became_underscores() -> None:
    names = [f"lora_unet_blocks_{block}_ff_net_0_proj.weight" for block in range(4)] + ["lora_te1_fc1"]
    assert [pattern for pattern, _ in grouped(names)] == ["lora_unet_blocks_{0..3}_ff_net_0_proj.weight", "lora_te1_fc1"]
    assert [pattern for pattern, _ in grouped(["a_1.q.weight", "a_2.q.weight"])] == ["a_1.q.weight", "a_2.q.weight"]
