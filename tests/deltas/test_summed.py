"""Sum: differences of one weight in the order given, their product side by side."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.deltas.miss import MiSS
from loratools.deltas.sparse import Sparse
from loratools.deltas.summed import Sum
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn

A, B, BLOCK = randn(2, 7, seed=0), randn(5, 2, seed=1), randn(3, 5, seed=2)
LOW = LowRank(A=to_ref(A), B=to_ref(B), alpha=6.0)
CHANGE = 3 * B.double() @ A.double() + BLOCK.double().T[:, torch.arange(7) % 3]


def test_parts_are_added_and_their_products_joined() -> None:
    delta, W = Sum(parts=(LOW, MiSS(block=to_ref(BLOCK)))), randn(5, 7, seed=5)
    assert torch.allclose(applied(delta, W), W.double() + CHANGE, rtol=1e-12, atol=1e-12) and blocks_agree(delta, W)
    fitted = delta.fitted(Spec("F32", (5, 7)))
    left, right = fitted.product() or (torch.zeros(0), torch.zeros(0))
    assert right.shape[0] == 5 and torch.allclose(left @ right, CHANGE, rtol=1e-12, atol=1e-12)
    assert fitted.norm() == pytest.approx(float(CHANGE.norm()), rel=1e-9)
    assert delta.kind == "lora+miss" and delta.reproducible and delta.shape() == (5, 7)
    assert list(delta.refs()) == ["0.A", "0.B", "1.block"] and delta.facts()["alpha"] == 6.0


def test_a_part_without_a_product() -> None:
    sparse = Sparse(values=to_ref(torch.ones(1)), places=to_ref(torch.tensor([8])))
    delta = Sum(parts=(LOW, sparse, Full(diff=to_ref(randn(5, 7, seed=3)))))
    assert delta.fitted(Spec("F32", (5, 7))).product() is None
    assert [one.spec for one in delta.map(lambda ref: ref).refs().values()] == [one.spec for one in delta.refs().values()]


def test_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="a sum of nothing"):
        Sum(parts=())
    delta = Sum(parts=(LOW, Full(diff=to_ref(torch.ones(5, 6)))))
    assert not delta.fits(Spec("F32", (5, 7))) and not delta.fits(Spec("F32", (5, 6)))
