"""LowRank: shapes, scalings, transposes, and as many slices of the exact product as the written dtype can show."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.lowrank import LowRank
from loratools.errors import NonFiniteError, ShapeError
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.files import raw
from tests.strategies import low_rank, randn, seeds


def lora(a: tuple[int, ...], b: tuple[int, ...], **more: object) -> LowRank:
    return LowRank(A=to_ref(randn(*a, seed=0)), B=to_ref(randn(*b, seed=1)), **{"alpha": 4.0, **more})  # type: ignore[arg-type]


def test_shape_rank_parameters() -> None:
    delta = lora((8, 10000), (5000, 8))
    assert (delta.shape(), delta.rank, delta.parameters, delta.nbytes) == ((5000, 10000), 8, 120_000, 480_000)
    assert lora((2, 3, 5, 1), (7, 2)).shape() == (7, 3, 5, 1)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 3)), ((2,), (4, 2)), ((2, 3), (4, 2, 1)), ((2, 3), (2, 4)), ((0, 3), (4, 0))])
def test_factors_that_do_not_meet(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError):
        lora(a, b)


@given(st.integers(1, 1024), st.sampled_from([1.0, 16.0, 0.1, -3.0]))
def test_scaling_is_one_division_of_what_is_stored(rank: int, alpha: float) -> None:
    delta = lora((rank, 1), (1, rank), alpha=alpha)
    assert delta.scaling == float(Fraction(alpha) / rank)  # correctly rounded
    stable = lora((rank, 1), (1, rank), alpha=alpha, rslora=True)
    assert stable.scaling == pytest.approx(alpha / math.sqrt(rank), rel=2.0**-52)


def test_spec_is_the_weights() -> None:
    delta = lora((2, 6), (4, 2))
    assert delta.spec(Spec("BF16", (4, 6))) == Spec("BF16", (4, 6))
    for base in (None, Spec("F32", (6, 4)), Spec("F32", (4, 6, 2)), Spec("F32", (24,))):
        with pytest.raises(ShapeError):
            delta.spec(base)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), seeds)
def test_a_transpose_is_the_transpose(rows: int, columns: int, rank: int, seed: int) -> None:
    delta = low_rank((rows, columns), rank, seed).delta
    assert isinstance(delta, LowRank)
    one = delta.bind_dense(Spec("F64", (rows, columns)))(slice(0, rows)).clone()
    other = delta.transposed().bind_dense(Spec("F64", (columns, rows)))(slice(0, columns))
    assert torch.allclose(one, other.T, rtol=1e-12, atol=1e-14)
    back = delta.transposed().transposed()
    assert raw(read_tensor(back.A)) == raw(read_tensor(delta.A)) and back.shape() == delta.shape()
    with pytest.raises(ShapeError, match="only a matrix"):
        lora((2, 3, 1), (4, 2)).transposed()


@pytest.mark.parametrize("rank", [1, 4, 16, 17, 64, 300])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_the_product_is_as_exact_as_the_dtype_can_show(dtype: str, rank: int) -> None:
    drawn = low_rank((50, 60), rank, 0, torch.float64)
    assert isinstance(drawn.delta, LowRank)
    found = drawn.delta.bind_dense(Spec(dtype, (50, 60)))(slice(0, 50))
    expected = drawn.dense(torch.zeros(50, 60, dtype=torch.float64))
    norms = 3 / rank * drawn.delta.factors()[0].norm(dim=1)[:, None] * drawn.delta.factors()[1].norm(dim=0)
    # one slice keeps √r·2⁻²⁶ of the norms' product, each further one 22 to 26 bits more, down to the rounding of float64
    bound = {"F64": 2.0**-50}.get(dtype, 2.0**-24 if dtype == "BF16" and rank <= 16 else 2.0**-42)
    assert bool(((found - expected).abs() <= bound * math.sqrt(rank) * norms).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_not_finite(bad: float) -> None:
    A = torch.ones(2, 3)
    A[1, 1] = bad
    with pytest.raises(NonFiniteError):
        LowRank(A=to_ref(A), B=to_ref(torch.ones(4, 2)), alpha=1.0).bind_dense(Spec("F32", (4, 3)))


def test_norm_and_map() -> None:
    drawn = low_rank((20, 30), 5, 3)
    assert isinstance(drawn.delta, LowRank)
    assert drawn.delta.norm() == pytest.approx(float(drawn.dense(torch.zeros(20, 30, dtype=torch.float64)).norm()), rel=1e-12)
    zeroed = drawn.delta.map(lambda ref: to_ref(torch.zeros(ref.spec.shape)))
    assert zeroed.norm() == 0 and zeroed.alpha == drawn.delta.alpha
