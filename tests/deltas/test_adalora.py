"""AdaLoRA by plain algebra, down to no rank at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.deltas.adalora import AdaLoRA
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def made(out: int, width: int, rank: int, seed: int) -> AdaLoRA:
    A, B, E = randn(rank, width, seed=seed), randn(out, rank, seed=seed + 1), randn(rank, 1, seed=seed + 2)
    return AdaLoRA(A=to_ref(A), B=to_ref(B), E=to_ref(E), alpha=6.0, first=8)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 5), seeds)
def test_algebra(out: int, width: int, rank: int, seed: int) -> None:
    W, A, B, E = (randn(*shape, seed=seed + i) for i, shape in ((9, (out, width)), (0, (rank, width)), (1, (out, rank)), (2, (rank, 1))))
    change, delta = 6 / 8.00001 * B.double() @ (A.double() * E.double()), made(out, width, rank, seed)
    assert torch.allclose(applied(delta, W), W.double() + change, rtol=1e-12, atol=1e-12)
    assert delta.norm() == pytest.approx(float(change.norm()), rel=1e-7, abs=1e-9)
    assert delta.facts() == {"rank": rank, "alpha": 6.0, "scaling": 6 / 8.00001}


def test_any_blocks_give_the_same_bytes_also_of_a_convolution() -> None:
    assert blocks_agree(made(37, 24, 3, 0), randn(37, 2, 3, 4, seed=5))


def test_what_does_not_meet() -> None:
    A, B, E = (to_ref(randn(*shape, seed=0)) for shape in ((3, 5), (4, 3), (3, 1)))
    for change in ({"E": B}, {"B": A}, {"A": B}):
        with pytest.raises(ShapeError, match=r"do not meet: found A .*, expected A \[r, in\], B \[out, r\], E \[r, 1\]"):
            AdaLoRA(**{"A": A, "B": B, "E": E, "alpha": 1.0, "first": 4} | change)
    delta = made(6, 12, 2, 0)
    assert delta.fits(Spec("F32", (6, 4, 3))) and not delta.fits(Spec("F32", (12, 6)))
