"""What headers tell of a delta: the row, the factors under what is wrapped around them, the weight's shape with a base and without."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.base import Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.facts import facts_of, low_rank, shape_of
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.ops._lora import low

LOW = low((20, 7), 2, 0)
DORA = DoRA(direction=LOW, magnitude=to_ref(torch.ones(20, 1)))
SAVED = Replacement(value=to_ref(torch.ones(20, 7)))


def test_the_row_of_a_lora() -> None:
    assert facts_of("q.weight", LOW) == {
        "name": "q.weight", "kind": "lora", "shape": [20, 7], "rank": 2, "alpha": 8.0, "scaling": 4.0, "parameters": 54, "dtype": "F32",
    }  # fmt: skip


@pytest.mark.parametrize("delta", [LOW, DORA, Chain(first=SAVED, then=LOW)])
def test_the_factors_under_what_is_wrapped_around_them(delta: Delta) -> None:
    assert low_rank(delta) is LOW and shape_of(delta, None) == (20, 7) and shape_of(delta, Spec("F32", (20, 7))) == (20, 7)


def test_what_has_no_factors() -> None:
    bias = Full(diff=to_ref(torch.ones(3)), scale=1.0)
    assert low_rank(bias) is None and low_rank(SAVED) is None
    assert facts_of("q.bias", bias)["rank"] is None and facts_of("q.bias", bias)["shape"] == [3]
