"""Projected: a subspace of the outputs taken out and filled again, by plain algebra with torch's own QR."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.projected import Projected
from loratools.errors import NonFiniteError, OptionError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


@given(st.integers(1, 150), st.integers(1, 7), st.integers(1, 4), st.sampled_from(["relu", "qr"]), st.booleans(), seeds)
def test_algebra(rows: int, columns: int, rank: int, method: str, filled: bool, seed: int) -> None:
    P, R, W = randn(rows, min(rank, rows), seed=seed), randn(min(rank, rows), columns, seed=seed + 1), randn(rows, columns, seed=seed + 2)
    left = torch.linalg.qr(P.double())[0] if method == "qr" else P.double()
    right = left if method == "qr" else left.relu()
    expected = W.double() + left @ ((1.5 * R.double() if filled else 0) - right.T @ W.double())
    delta = Projected(P=to_ref(P), R=to_ref(R) if filled else None, scale=1.5, method=method)
    assert torch.allclose(applied(delta, W), expected, rtol=1e-10, atol=1e-10)
    assert blocks_agree(delta, W)


def test_taking_out_a_subspace_leaves_nothing_of_it() -> None:
    P, W = randn(20, 3, seed=0), randn(20, 5, seed=1)
    found = applied(Projected(P=to_ref(P), method="qr"), W)
    assert float((torch.linalg.qr(P.double())[0].T @ found).abs().max()) < 1e-12


def test_a_kernel_counts_as_columns() -> None:
    P, R, W = randn(6, 2, seed=0), randn(2, 12, seed=1), randn(6, 3, 2, 2, seed=2)
    delta = Projected(P=to_ref(P), R=to_ref(R))
    assert torch.equal(applied(delta, W), applied(delta, W.flatten(1)).reshape(W.shape))


def test_what_does_not_meet_or_fit() -> None:
    with pytest.raises(OptionError, match="method: found svd, expected relu or qr"):
        Projected(P=to_ref(torch.ones(4, 2)), method="svd")
    for p, r in (((4,), None), ((2, 3), None), ((4, 0), None), ((4, 2), (3, 5)), ((4, 2), (2,))):
        with pytest.raises(ShapeError, match="the factors do not meet"):
            Projected(P=to_ref(torch.ones(p)), R=None if r is None else to_ref(torch.ones(r)))
    delta = Projected(P=to_ref(torch.ones(4, 2)), R=to_ref(torch.ones(2, 5)))
    assert delta.fits(Spec("F32", (4, 5))) and not delta.fits(Spec("F32", (5, 4)))
    with pytest.raises(ShapeError, match=r"found \[4, 5\], expected \[4, 6\]"):
        delta.spec(Spec("F32", (4, 6)))
    assert delta.facts() == {"rank": 2, "scaling": 1.0}


def test_a_subspace_that_is_not_certain() -> None:
    W = torch.ones(3, 2)
    for method in ("relu", "qr"):
        with pytest.raises(NonFiniteError, match="a factor holds inf or nan"):
            applied(Projected(P=to_ref(torch.tensor([[float("nan")]] * 3)), method=method), W)
    twice = to_ref(torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.5, 0.5]]))
    with pytest.raises(UnsupportedError, match=r"a P that has no certain Q: column 1 is zero, or depends"):
        applied(Projected(P=twice, method="qr"), W)
    unsure = torch.tensor([[1.0, 0.0], [0.0, 1e-9], [0.0, 1.0]])  # float32 may make the 1e-9 negative
    delta = Projected(P=to_ref(unsure), R=to_ref(torch.ones(2, 2)), method="qr")
    with pytest.raises(UnsupportedError, match=r"rounding decides the sign of column 1; rounding alone decides what peft makes of it"):
        applied(delta, W)
    assert torch.isfinite(applied(Projected(P=to_ref(unsure), method="qr"), W)).all()  # a sign does not matter where nothing is put in
