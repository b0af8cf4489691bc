"""W′ − W of every kind of delta against plain algebra, whole or as it is stored, in any blocks; and what is no number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loratools.changes as changes
import loratools.effect as effects
from loratools.changes import reader
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.laid import TurnedAdditive
from loratools.deltas.lowrank import LowRank
from loratools.deltas.scaled import Scaled
from loratools.effect import Effect, Made
from loratools.errors import NonFiniteError
from loratools.refs import InMemory, Ref, Spec
from loratools.tensors import read_tensor, to_ref
from tests.strategies import Drawn, deltas, floats, low_rank, of_dtype, randn


def effect(drawn: Drawn) -> Effect:
    weight = to_ref(drawn.W)
    return Effect(delta=drawn.delta, spec=weight.spec, weight=weight)


@settings(max_examples=60)
@given(deltas(), floats)
def test_the_whole_change(drawn: Drawn, dtype: torch.dtype) -> None:
    drawn = of_dtype(drawn, dtype)
    W = drawn.W.double()
    expected = drawn.dense(W) - W
    change = effect(drawn).change()
    # float64 arithmetic in another order: 1e-12 of the numbers W′ and W that are subtracted
    size = float(W.norm() + drawn.dense(W).norm())
    assert torch.allclose(change.D.view(W.shape), expected, rtol=0, atol=1e-12 * size)
    assert change.norm == pytest.approx(float(expected.norm()), abs=1e-12 * size) and change.rounding == 0


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_the_same_bytes_in_any_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    drawn = low_rank((20, 12), 3, 0)
    assert isinstance(drawn.delta, LowRank)
    dora = DoRA(direction=drawn.delta, magnitude=to_ref(randn(20, 1, seed=3)))
    weight = to_ref(drawn.W)
    some = drawn.delta, dora, TurnedAdditive(delta=drawn.delta.transposed())
    made = [Effect(delta=delta, spec=weight.spec, weight=weight) for delta in some]
    expected = [bytes(Made(one, "F64").read()) for one in made]
    monkeypatch.setattr(changes, "BLOCK", block)
    assert [bytes(Made(one, "F64").read()) for one in made] == expected


def test_a_difference_is_known_without_the_weight() -> None:
    drawn = low_rank((6, 5), 2, 0)
    found = Effect(delta=drawn.delta, spec=Spec("F32", (6, 5))).change()
    assert torch.allclose(found.D, drawn.dense(torch.zeros(6, 5).double()), rtol=1e-13)


@pytest.mark.parametrize(("code", "unit"), [("F64", 2.0**-53), ("F32", 2.0**-24), ("BF16", 2.0**-8), ("F16", 2.0**-11)])
@given(st.integers(0, 99))
def test_what_is_stored_is_rounded_once_and_measured(code: str, unit: float, seed: int) -> None:
    drawn = low_rank((9, 7), 2, seed)
    assert isinstance(drawn.delta, LowRank)
    made = Made(effect(Drawn(drawn.delta, drawn.W, drawn.dense)), code)
    assert (made.norm, made.error) == (None, None)
    stored, exact = read_tensor(made, torch.float64), drawn.dense(drawn.W.double()) - drawn.W.double()
    norm = float(exact.norm())
    assert made.norm == pytest.approx(norm, rel=1e-12)
    assert made.error is not None and made.error <= unit * norm
    if code in ("BF16", "F16"):
        assert made.error == pytest.approx(float((stored - exact).norm()), rel=1e-6)
    assert bytes(made.rows(2, 5)) == bytes(made.read())[2 * made.spec.row_bytes() : 5 * made.spec.row_bytes()]


def test_large_ones_are_float32_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "SMALL", 10)
    drawn = low_rank((6, 5), 2, 0)
    change = effect(drawn).change()
    exact = drawn.dense(torch.zeros(6, 5).double())
    assert change.D.dtype == torch.float32 and 0 < float((change.D.double() - exact).norm()) <= change.rounding < 1e-7 * change.norm


def test_memory_is_a_few_blocks() -> None:
    """Rows are asked for as blocks of fixed size, never the whole."""
    asked: list[int] = []

    class Watched(InMemory):
        def rows(self, start: int, stop: int):  # type: ignore[no-untyped-def]
            asked.append(stop - start)
            return super().rows(start, stop)

        def reshape(self, *shape: int) -> Ref:
            return self

    W = to_ref(torch.ones(3000, 1000))
    weight = Watched(W.spec, W.read())
    for _ in Made(Effect(delta=Scaled(l=to_ref(torch.full((3000,), 2.0))), spec=W.spec, weight=weight), "F32").blocks():
        pass
    assert max(asked) == changes.BLOCK // 1000


def test_the_weights_rows_as_they_are_read() -> None:
    drawn = low_rank((6, 5), 2, 0)
    assert [part for part, _ in effect(drawn).read()(4)] == [slice(0, 4), slice(4, 6)]
    assert torch.equal(torch.cat([W for _, W in reader(to_ref(drawn.W), 10)(2)]), drawn.W.double().reshape(3, 10))


def test_what_is_no_number_is_an_error() -> None:
    low = LowRank(A=to_ref(torch.ones(1, 3)), B=to_ref(torch.tensor([[0.0], [1.0]])), alpha=1.0)
    dora = DoRA(direction=low, magnitude=to_ref(torch.ones(2, 1)))
    weight = to_ref(torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]))
    with pytest.raises(NonFiniteError, match=r"W' is not finite; .*a DoRA needs W \+ ΔW to have a length"):
        Effect(delta=dora, spec=weight.spec, weight=weight).change()
    large = Effect(delta=Full(diff=to_ref(torch.full((2, 2), 1e6))), spec=Spec("F32", (2, 2)))
    with pytest.raises(NonFiniteError, match=r"W' - W would not be finite in F16: found 1e\+06; give a wider --dtype"):
        Made(large, "F16").read()
