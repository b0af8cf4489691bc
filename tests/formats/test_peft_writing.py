"""What peft's writers share: settings with their exceptions, numbers, and the keys of tensors saved whole."""

from __future__ import annotations

import pytest

from loratools.errors import LoratoolsError
from loratools.formats.peft_targets import dotted_key
from loratools.formats.peft_writing import commonest, dotted_patterned, patterned, saved, shortest
from tests.formats.matrix import Draw


def test_the_commonest_and_its_exceptions() -> None:
    assert patterned({}, "r", "rank_pattern") == {"r": 8, "rank_pattern": {}}
    assert patterned({"a": 4, "b+": 2, "c": 2, "d": 4}, "r", "rank_pattern") == {"r": 2, "rank_pattern": {"^a": 4, "^d": 4}}
    assert commonest([3, 1, 3, 1], 0) == 1 and commonest([], 5) == 5


def test_numbers() -> None:
    assert (shortest(2.0), type(shortest(2.0)), shortest(0.5)) == (2, int, 0.5)


def test_whole_tensors_and_biases_that_lie_alone() -> None:
    ref = Draw()(2)
    whole = dict.fromkeys(("head.weight", "head.bias", "q.weight", "k.bias", "emb.weight"), ref)
    tensors, modules, loose = saved(whole, ["q"], ["emb"])
    root = "base_model.model."
    assert set(tensors) == {
        f"{root}head.weight", f"{root}head.bias", f"{root}q.base_layer.weight", f"{root}k.bias",
        f"{root}emb.token_adapter.base_layer.weight",
    }  # fmt: skip
    assert modules == ["head"] and loose == ["k.bias"]


def test_patterns_of_the_older_rule_mean_one_module_only() -> None:
    """FourierFT's and C3A's fit what stands behind a dot, or are the whole of a name."""
    paths = ["q", "a.q", "b.a.q", "axq", "a.q.x", "a.b.q", "xa.q", "k.1.v"]
    for shift in range(len(paths)):
        values = {path: max(2, (place + shift) % len(paths)) for place, path in enumerate(paths)}
        made = dotted_patterned(values, "n", "patterns")
        found = {path: made["patterns"].get(dotted_key(made["patterns"], path), made["n"]) for path in paths}
        assert found == values


def test_names_that_no_pattern_tells_apart() -> None:
    with pytest.raises(LoratoolsError, match=r"q\.\.weight: a n that no pattern of peft's can say; convert it first"):
        dotted_patterned({"q.": 2, "a.qx": 3, "b": 3, "c": 3}, "n", "patterns")
