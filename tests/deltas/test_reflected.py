"""Reflected: a chain of Householder reflections, one matrix after the other in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.reflected import Reflected
from loratools.errors import NonFiniteError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 6), st.booleans(), seeds)
def test_algebra(columns: int, rows: int, rank: int, orthogonal: bool, seed: int) -> None:
    rank = min(rank, columns) if orthogonal else rank
    U, W = randn(columns, rank, seed=seed), randn(rows, columns, seed=seed + 1)
    normals = torch.linalg.qr(U.double())[0] if orthogonal else U.double() / U.double().norm(dim=0)
    expected = W.double()
    for u in normals.T:
        expected = expected - 2 * torch.outer(expected @ u, u)
    # Gram and Schmidt lose as much as the columns depend on each other: of up to six random ones in twelve dimensions a few digits
    tolerance = 1e-7 if orthogonal else 1e-12
    delta = Reflected(U=to_ref(U), orthogonal=orthogonal)
    assert torch.allclose(applied(delta, W), expected, rtol=tolerance, atol=tolerance * float(W.norm()))
    assert blocks_agree(delta, W) and delta.facts() == {"rank": rank}


def test_a_kernel_is_mirrored_with_its_channels() -> None:
    U, W = randn(12, 2, seed=0), randn(5, 3, 2, 2, seed=1)
    flat = applied(Reflected(U=to_ref(U)), W.flatten(1))
    assert torch.equal(applied(Reflected(U=to_ref(U)), W), flat.reshape(W.shape))


def test_lengths_stay() -> None:
    W = randn(7, 9, seed=0)
    found = applied(Reflected(U=to_ref(randn(9, 5, seed=1))), W)
    assert torch.allclose(found.norm(dim=1), W.double().norm(dim=1), rtol=1e-12)


def test_what_it_does_not_fit() -> None:
    delta = Reflected(U=to_ref(torch.ones(4, 2)))
    assert delta.fits(Spec("F32", (9, 4))) and delta.fits(Spec("F32", (9, 2, 2))) and not delta.fits(Spec("F32", (4, 9)))
    with pytest.raises(ShapeError, match="mirrors other columns than the weight has: found 4, expected 9"):
        delta.spec(Spec("F32", (4, 9)))
    for shape in ((4,), (4, 0), (4, 2, 1)):
        with pytest.raises(ShapeError, match="no normals of planes"):
            Reflected(U=to_ref(torch.ones(shape)))


def test_planes_without_a_normal() -> None:
    W = torch.ones(2, 3)
    with pytest.raises(NonFiniteError, match="a plane's normal is zero, or holds inf or nan"):
        applied(Reflected(U=to_ref(torch.tensor([[1.0, 0.0]] * 3))), W)
    with pytest.raises(NonFiniteError, match="a plane's normal is zero, or holds inf or nan"):
        applied(Reflected(U=to_ref(torch.tensor([[1.0, float("nan")]] * 3))), W)


def test_columns_that_cannot_be_made_orthogonal() -> None:
    """As peft initialises them, in equal pairs: what its Gram and Schmidt makes of the second of each is rounding."""
    pairs = torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.5, 0.5]])
    assert applied(Reflected(U=to_ref(pairs)), torch.eye(3)).allclose(torch.eye(3, dtype=torch.float64), atol=1e-12)
    with pytest.raises(UnsupportedError, match=r"cannot be made orthogonal: column 1 is zero, or depends on those before it"):
        applied(Reflected(U=to_ref(pairs), orthogonal=True), torch.eye(3))
