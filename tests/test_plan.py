"""plan: one model's part of it and back, and the changes of a checkpoint's tensors that follow from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.checkpoint import Checkpoint
from loratools.deltas.coupled import Coupled
from loratools.deltas.full import Replacement
from loratools.errors import MatchError
from loratools.plan import Plan, changes_of, supplied
from loratools.statistics import Statistics
from loratools.tensors import to_ref
from tests.strategies import low_rank, randn

Q = "model.layers.0.self_attn.q_proj.weight"


def test_a_models_part_under_its_own_names_and_back() -> None:
    one, two = [(low_rank((4, 3), 1, seed).delta, 1.0) for seed in (0, 1)]
    plan = Plan({"unet.a": [one], "text_encoder.a": [two]}, notes=["before"], expected=2)
    inner = plan.within("unet.")
    assert inner.changes == {"a": [one]} and plan.within("") is plan
    inner.changes, inner.sources, inner.config = {"a": [one], "b": []}, {"b": "a"}, {"tie": False}
    inner.notes, inner.expected, inner.without_effect = ["said"], 1, 3
    plan.put_back("unet.", inner)
    assert plan.changes == {"text_encoder.a": [two], "unet.a": [one], "unet.b": []} and plan.sources == {"unet.b": "unet.a"}
    assert plan.config == {"unet.tie": False} and plan.notes == ["before", "unet: said"]
    assert (plan.expected, plan.without_effect) == (3, 3)
    plan.put_back("", plan)  # a plain model's is the plan itself
    assert plan.expected == 3


def test_changes_in_place_and_added_and_the_dtype_of_the_rest(base: Path) -> None:
    checkpoint = Checkpoint(base)
    new = Replacement(value=to_ref(randn(2, 8, seed=0)))
    plan = Plan({Q: [(low_rank((8, 8), 2, 0).delta, 0.5)], "score.weight": [(new, 1.0)], "copy.weight": []}, sources={"copy.weight": Q})
    statistics: dict[str, Statistics] = {}
    changes, added = changes_of(checkpoint, plan, statistics)
    assert set(changes) == {Q} and list(added) == ["score.weight", "copy.weight"] and set(statistics) == {Q, *added}
    assert added["copy.weight"].spec == checkpoint.specs[Q]
    copied = b"".join(bytes(block) for block in added["copy.weight"].blocks(lambda _: None))
    assert copied == bytes(checkpoint[Q].read())
    changes, added = changes_of(checkpoint, plan, statistics, dtype="BF16")
    assert set(changes) == set(checkpoint) and {change.spec.dtype for change in (*changes.values(), *added.values())} == {"BF16"}


def test_what_a_delta_reads_of_the_base_must_be_there(base: Path) -> None:
    checkpoint = Checkpoint(base)
    coupled = Coupled(own=None, left=to_ref(randn(8, 1, seed=0)), right=None)
    bias = Q.replace("weight", "bias")
    assert supplied(bias, coupled, checkpoint) is not coupled
    plain = low_rank((8, 8), 2, 0).delta
    assert supplied(Q, plain, checkpoint) is plain
    with pytest.raises(MatchError, match=r"x\.weight: its change of x\.bias reads this tensor, which the base lacks"):
        supplied("x.bias", coupled, checkpoint)
