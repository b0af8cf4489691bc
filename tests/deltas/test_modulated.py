"""Modulated and Spread: elementwise products and sums by plain algebra, turned weights, and what undoes them."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.full import Full
from loratools.deltas.laid import TurnedAdditive, turned
from loratools.deltas.loha import LoHa
from loratools.deltas.lowrank import LowRank
from loratools.deltas.modulated import Modulated, Spread
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import low_rank, randn


@pytest.mark.parametrize("shape", [(7, 11), (4, 3, 2, 5)])
def test_algebra(shape: tuple[int, ...]) -> None:
    times, plus = low_rank(shape, 2, 1), randn(*shape, seed=5)
    W, zero = randn(*shape, seed=9).double(), torch.zeros(shape, dtype=torch.float64)
    one = Modulated(times=times.delta)  # type: ignore[arg-type]
    both = Modulated(times=times.delta, plus=Full(diff=to_ref(plus)))  # type: ignore[arg-type]
    factor = 1 + times.dense(zero)
    assert torch.allclose(applied(one, W), W * factor, rtol=1e-12, atol=1e-12)
    assert torch.allclose(applied(both, W), W * factor + plus.double(), rtol=1e-12, atol=1e-12)
    assert blocks_agree(one, W) and blocks_agree(both, W)
    assert one.facts() == {"rank": 2, "alpha": 3.0, "scaling": 1.5} and list(both.refs()) == ["times.A", "times.B", "plus.diff"]


@pytest.mark.parametrize("value", [torch.tensor([2.0, 3.0, 5.0]), torch.tensor([[2.0], [3.0], [5.0]])])
def test_a_number_for_each_row(value: torch.Tensor) -> None:
    W, numbers = randn(3, 4, seed=0), torch.tensor([[2.0], [3.0], [5.0]]).double()
    delta = Modulated(times=Spread(value=to_ref(value)), plus=Spread(value=to_ref(torch.tensor([7.0])), single=True))
    assert torch.equal(applied(delta, W), W.double() * (1 + numbers) + 7)
    bias = torch.tensor([1.0, 10.0, 100.0])
    assert applied(delta, bias).tolist() == [10.0, 47.0, 607.0]
    fitted = delta.fitted(Spec("F32", (3, 4)))
    assert fitted.times.shape() == (3, 4) and fitted.plus is not None and fitted.plus.norm() == pytest.approx(7 * 12**0.5)


def test_a_weight_stored_transposed() -> None:
    W, low = randn(5, 3, seed=0), low_rank((3, 5), 2, 1)
    a, b = ([to_ref(randn(*shape, seed=seed)) for seed in (2, 3)] for shape in ((3, 2), (2, 5)))
    loha = LoHa(w1_a=a[0], w1_b=b[0], w2_a=a[1], w2_b=b[1], scale=1.0)
    delta = Modulated(times=low.delta, plus=loha)  # type: ignore[arg-type]
    found = turned(delta)
    assert isinstance(found, Modulated) and isinstance(found.times, LowRank) and isinstance(found.plus, TurnedAdditive) and found.align == 1
    assert torch.allclose(applied(found, W), applied(delta, W.T).T, rtol=1e-12, atol=1e-12)


def test_the_map_that_undoes_it() -> None:
    W, shape = randn(6, 8, seed=0).double(), Spec("F64", (6, 8))
    delta = Modulated(times=low_rank((6, 8), 2, 1).delta, plus=Full(diff=to_ref(randn(6, 8, seed=7))))  # type: ignore[arg-type]
    for strength in (1.0, 0.3):
        affine = delta.affine(shape, lambda rows: iter(()), lambda make: make(), strength)
        assert affine is not None
        a, d = affine(slice(0, 6))
        expected = W + strength * (applied(delta, W) - W)
        assert a is not None and torch.allclose(a * (W + d), expected, rtol=1e-10, atol=1e-10)
    rotated = Modulated(times=_Fleeting(diff=to_ref(torch.ones(6, 8))))
    assert rotated.affine(shape, lambda rows: iter(()), lambda make: make()) is None


class _Fleeting(Full):
    """A difference that another machine may compute otherwise."""

    reproducible = False


def test_what_it_does_not_fit() -> None:
    delta = Modulated(times=Full(diff=to_ref(torch.ones(3, 4))), plus=Spread(value=to_ref(torch.ones(3, 1))))
    assert delta.fits(Spec("F32", (3, 4))) and not delta.fits(Spec("F32", (3, 5)))
    with pytest.raises(ShapeError, match="holds numbers for other rows than the weight has: found 2, expected 3"):
        Modulated(times=delta.times, plus=Spread(value=to_ref(torch.ones(2)))).spec(Spec("F32", (3, 4)))
    with pytest.raises(ShapeError, match="found 3, expected 1"):
        Spread(value=to_ref(torch.ones(3)), single=True).spec(Spec("F32", (3, 4)))
    with pytest.raises(ShapeError, match="no number for each row"):
        Spread(value=to_ref(torch.ones(1, 3)))
    with pytest.raises(UnsupportedError):
        Spread(value=to_ref(torch.ones(3))).spec(Spec("I32", (3, 4)))
