"""Around: another delta's kind, facts, tensors and banks, whatever is around it."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.around import Around
from loratools.deltas.cut import Cut
from loratools.deltas.laid import Turned, TurnedAdditive, Unsettled, WherePresent
from loratools.deltas.lokr import LoKr
from loratools.tensors import to_ref

INNER = LoKr(w1=to_ref(torch.ones(2, 2)), w2=to_ref(torch.ones(3, 2)), scale=2.0, alpha=4.0)


AROUND = [kind(delta=INNER) for kind in (TurnedAdditive, Turned, Unsettled, WherePresent)]


@pytest.mark.parametrize("around", [Cut(delta=INNER, start=0, stop=2), *AROUND])
def test_it_says_what_the_inner_one_says(around: Around) -> None:
    assert (around.kind, around.facts(), around.refs(), around.draws) == (INNER.kind, INNER.facts(), INNER.refs(), INNER.draws)
    mapped = around.map(lambda ref: ref.reshape(*ref.spec.shape))
    assert type(mapped) is type(around) and isinstance(mapped.delta, LoKr) and mapped.delta is not INNER
