"""Full and Replacement: what fits, what it becomes, and in which dtype."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.full import Full, Replacement
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.strategies import randn


def replacement(*shape: int, dtype: torch.dtype = torch.float32) -> Replacement:
    return Replacement(value=to_ref(torch.ones(shape, dtype=dtype)))


@pytest.mark.parametrize(
    ("shape", "base"), [((4, 6), (4, 6)), ((9, 6), (4, 6)), ((2, 6), (4, 6)), ((5,), (4,)), ((), ()), ((3, 2, 1), (7, 2, 1))]
)
def test_a_replacement_may_have_other_rows(shape: tuple[int, ...], base: tuple[int, ...]) -> None:
    assert replacement(*shape).spec(Spec("BF16", base)) == Spec("BF16", shape)  # the base's dtype


@pytest.mark.parametrize(("shape", "base"), [((4, 5), (4, 6)), ((6,), (4, 6)), ((4, 6, 1), (4, 6)), ((1,), ()), ((), (1,))])
def test_but_nothing_else_of_its_own(shape: tuple[int, ...], base: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="does not fit the base's"):
        replacement(*shape).spec(Spec("F32", base))


def test_a_tensor_the_base_lacks_keeps_its_dtype() -> None:
    assert replacement(2, 3, dtype=torch.float16).spec(None) == Spec("F16", (2, 3)) and not replacement(2).needs_base


def test_a_full_difference_is_scaled() -> None:
    diff = randn(4, 6, seed=0)
    delta = Full(diff=to_ref(diff), scale=-0.25)
    assert torch.equal(delta.bind_dense(Spec("F32", (4, 6)), 2.0)(slice(1, 3)), -0.5 * diff.double()[1:3])
    assert delta.norm() == pytest.approx(0.25 * float(diff.double().norm()), rel=1e-14)
    for base in (None, Spec("F32", (6, 4)), Spec("F32", (24,))):
        with pytest.raises(ShapeError):
            delta.spec(base)


def test_vectors_and_scalars() -> None:
    for shape in ((5,), ()):
        delta = Full(diff=to_ref(randn(*shape, seed=0)))
        rows, columns = Spec("F32", shape).matrix
        assert delta.bind_dense(Spec("F32", shape))(slice(0, rows)).shape == (rows, columns)
