"""Chain, Part, Stacked: their shapes, what they refuse, and the rows their members see (their algebra is in test_stream)."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.bat import Bat
from loratools.deltas.compose import Chain, Part, Stacked
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Turned
from loratools.errors import LoratoolsError, ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import low_rank, randn


def full(*shape: int) -> Full:
    return Full(diff=to_ref(torch.ones(shape)))


def test_a_chain_takes_the_shape_of_what_comes_first() -> None:
    chain = Chain(first=Replacement(value=to_ref(torch.ones(9, 4))), then=low_rank((9, 4), 2, 0).delta)
    assert chain.spec(Spec("BF16", (5, 4))) == Spec("BF16", (9, 4)) and chain.spec(None) == Spec("F32", (9, 4))
    assert not chain.needs_base and set(chain.refs()) == {"first.value", "then.A", "then.B"} and chain.parameters == 36 + 26
    with pytest.raises(ShapeError):
        Chain(first=Replacement(value=to_ref(torch.ones(9, 4))), then=full(5, 4)).spec(Spec("F32", (5, 4)))
    assert Chain(first=full(5, 4), then=full(5, 4)).needs_base


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 5), (5, 8)])
def test_a_part_lies_within(start: int, stop: int) -> None:
    part = Part(delta=full(3, 4), start=start, stop=stop)
    assert part.spec(Spec("F32", (8, 4))) == Spec("F32", (8, 4))


@pytest.mark.parametrize(("start", "stop", "rows", "columns"), [(6, 9, 8, 4), (-1, 2, 8, 4), (3, 3, 8, 4), (0, 3, 8, 5), (0, 4, 8, 4)])
def test_or_is_refused(start: int, stop: int, rows: int, columns: int) -> None:
    with pytest.raises(ShapeError):
        Part(delta=full(3, 4), start=start, stop=stop).spec(Spec("F32", (rows, columns)))
    with pytest.raises(LoratoolsError):
        Part(delta=full(3, 4), start=start, stop=stop).spec(None)


def test_a_chain_sees_as_many_rows_together_as_either_needs() -> None:
    M, value = randn(3, 4, 4, seed=0), randn(12, 8, seed=1)
    saved = Replacement(value=to_ref(value))
    chain = Chain(first=saved, then=Bat(M=to_ref(M)))
    assert chain.align == 4 and Chain(first=saved, then=Turned(delta=Bat(M=to_ref(M)))).align is None
    assert Chain(first=Bat(M=to_ref(randn(2, 6, 6, seed=2))), then=chain.then).align == 12
    assert blocks_agree(chain, randn(12, 8, seed=3))
    assert torch.equal(applied(chain, torch.zeros(12, 8)), applied(chain.then, value))


def test_a_stack_has_as_many_members() -> None:
    stack = Stacked(members=(full(3, 4), None))
    assert stack.spec(Spec("F16", (2, 3, 4))) == Spec("F16", (2, 3, 4))
    for base in (None, Spec("F16", (3, 3, 4)), Spec("F16", (6, 4)), Spec("F16", (2, 4, 3))):
        with pytest.raises(ShapeError):
            stack.spec(base)
    assert set(stack.refs()) == {"0.diff"}


def test_map_reaches_every_member() -> None:
    seen: list[tuple[int, ...]] = []

    def note(ref):  # type: ignore[no-untyped-def]
        seen.append(ref.spec.shape)
        return ref

    Stacked(members=(full(3, 4), None, full(5, 1))).map(note)
    Part(delta=full(2, 2), start=0, stop=2).map(note)
    Chain(first=full(1, 7), then=full(6, 1)).map(note)
    assert seen == [(3, 4), (5, 1), (2, 2), (1, 7), (6, 1)]
