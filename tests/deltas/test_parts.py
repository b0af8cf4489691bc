"""Parts and Joined: changes of rows that lie apart, against the same changes of slices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Part
from loratools.deltas.full import Full
from loratools.deltas.parts import Joined, Parts, joined
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.strategies import Drawn, dora, low_rank, randn

BASE = Spec("F64", (11, 6))
W = randn(11, 6, seed=9).double()


def reads(rows: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, 11, rows):
        yield slice(start, min(start + rows, 11)), W[start : start + rows].clone()


def made(drawn: Drawn, start: int) -> Part:
    return Part(delta=drawn.delta, start=start, stop=start + drawn.W.shape[0])


def blockwise(delta: Delta, step: int) -> Tensor:
    bound = delta.bind(BASE, reads)
    return torch.cat([bound(part, block.clone()) for part, block in reads(step)])


def expected(*drawn: tuple[Drawn, int]) -> Tensor:
    out = W.clone()
    for one, start in drawn:
        place = slice(start, start + one.W.shape[0])
        out[place] = one.dense(W[place])
    return out


@given(st.integers(1, 11))
def test_differences_join_into_one(step: int) -> None:
    low, other = low_rank((4, 6), 2, 1), low_rank((3, 6), 3, 5)
    delta = joined([made(other, 6), made(low, 1)])
    assert isinstance(delta, Joined) and delta.kind == "lora" and delta.reproducible and delta.factored
    wanted = expected((low, 1), (other, 6))
    assert torch.allclose(blockwise(delta, step), wanted, rtol=0, atol=1e-14)  # float64 sums of one term each
    assert torch.equal(blockwise(delta, step), blockwise(delta, 11))
    assert delta.norm() == pytest.approx(float((wanted - W).norm()), rel=1e-12)
    dense = delta.bind_dense(BASE, 0.5)
    assert torch.allclose(dense(slice(0, 11)), 0.5 * (wanted - W), rtol=0, atol=1e-14)


@given(st.integers(1, 11))
def test_rows_may_be_asked_for_in_any_order(step: int) -> None:
    delta = joined([made(low_rank((4, 6), 2, 1), 1), made(low_rank((3, 6), 3, 5), 6)])
    assert isinstance(delta, Additive)
    dense, whole = delta.bind_dense(BASE), delta.bind_dense(BASE)(slice(0, 11)).clone()
    for start in range(11 - step, -1, -1):
        assert torch.equal(dense(slice(start, start + step)), whole[start : start + step])


def test_only_what_is_asked_for_is_bound() -> None:
    bound: list[int] = []

    class Watched(Full):
        def bind_dense(self, base, scale=1.0, device="cpu"):  # type: ignore[no-untyped-def]
            bound.append(self.diff.spec.shape[0])
            return super().bind_dense(base, scale, device)

    made = {start: Watched(diff=to_ref(torch.ones(rows, 6))) for start, rows in ((0, 2), (3, 4), (8, 3))}
    delta = joined(Part(delta=full, start=start, stop=start + full.diff.spec.shape[0]) for start, full in made.items())
    assert isinstance(delta, Joined)
    dense = delta.bind_dense(BASE)
    dense(slice(2, 3))
    assert bound == []
    dense(slice(3, 5))
    dense(slice(5, 9))
    dense(slice(9, 11))
    assert bound == [4, 3]


@pytest.mark.parametrize("axis", ["out", "in"])
def test_what_is_no_difference_is_bound_at_once(axis: str) -> None:
    low, other = low_rank((4, 6), 2, 1), dora(low_rank((3, 6), 3, 5), axis, 8)
    delta = joined([made(low, 1), made(other, 6)])
    assert isinstance(delta, Parts) and delta.align == 1
    found = blockwise(delta, 11)
    assert torch.allclose(found, expected((low, 1), (other, 6)), rtol=0, atol=1e-13)
    affine = delta.affine(BASE, reads, lambda make: make())
    assert affine is not None
    a, d = affine(slice(0, 11))
    assert a is not None and torch.allclose(found / a - d, W, rtol=0, atol=1e-12)


def test_shared_rows_and_other_tensors_are_refused() -> None:
    low, other = low_rank((4, 6), 2, 1), low_rank((3, 6), 3, 5)
    with pytest.raises(ShapeError, match="two changes of the same rows: found rows 3 to 5"):
        joined([made(other, 3), made(low, 1)])
    delta = joined([made(low, 1), made(other, 6)])
    assert delta.spec(BASE) == BASE
    for wrong in (None, Spec("F32", (8, 6)), Spec("F32", (11, 5))):
        with pytest.raises(ShapeError):
            delta.spec(wrong)


def test_facts_are_what_all_share() -> None:
    same = joined([made(low_rank((4, 6), 2, 1), 1), made(low_rank((3, 6), 2, 5), 6)])
    assert same.facts() == {"rank": 2, "alpha": 3.0, "scaling": 1.5}
    other = joined([made(low_rank((4, 6), 2, 1), 1), made(low_rank((3, 6), 3, 5), 6)])
    assert other.facts() == {"alpha": 3.0}
    assert set(other.refs()) == {"1.A", "1.B", "6.A", "6.B"}
    seen: list[tuple[int, ...]] = []
    other.map(lambda ref: (seen.append(ref.spec.shape), ref)[1])
    assert seen == [(2, 6), (4, 2), (3, 6), (3, 3)]
