"""LoRA on what PiSSA or OLoRA left of a weight: the part computed again, and refused where it is not what the factors came from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.deltas.dora import DoRA
from loratools.deltas.laid import turned
from loratools.deltas.lowrank import LowRank
from loratools.deltas.residual import FAR, INITS, Residual
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import read_tensor, to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn

RANK, ALPHA = 3, 4.5


def weight(seed: int = 1) -> Tensor:
    """A weight (12, 9) in float32 with singular values that stand apart."""
    left, right = torch.linalg.qr(randn(12, 9, seed=seed).double())[0], torch.linalg.qr(randn(9, 9, seed=seed + 1).double())[0]
    return ((left * torch.arange(9, 0, -1)) @ right).float()


def start(W: Tensor, init: str) -> tuple[Tensor, Tensor]:
    """B and A as peft makes them, in float64."""
    scaling = ALPHA / RANK
    if init == "olora":
        Q, R = torch.linalg.qr(W.double())
        return Q[:, :RANK], R[:RANK]
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    root = (S[:RANK] / scaling).sqrt()
    return U[:, :RANK] * root, root[:, None] * Vh[:RANK]


def trained(W: Tensor, init: str, step: float = 0.1, **more: Any) -> tuple[Residual, Tensor]:
    """A delta whose factors moved from their start, and what it should make of W."""
    B0, A0 = start(W, init)
    B, A = (X + step * randn(*X.shape, seed=5).double() * X.norm() / X.numel() ** 0.5 for X in (B0, A0))
    low = LowRank(A=to_ref(A), B=to_ref(B), alpha=ALPHA, layer="linear")
    V = W.double() + ALPHA / RANK * (B @ A - B0 @ A0)
    magnitude = more.get("magnitude")
    if magnitude is not None:
        then = DoRA(direction=low, magnitude=to_ref(magnitude))
        return Residual(init=init, then=then), V / V.norm(dim=1, keepdim=True) * magnitude
    return Residual(init=init, then=low), V


@pytest.mark.parametrize("init", INITS)
def test_algebra(init: str) -> None:
    W = weight()
    delta, expected = trained(W, init)
    found = applied(delta, W)
    assert torch.allclose(found, expected, atol=1e-11)
    assert float((found - (W.double() + delta.low.scaling * torch.mm(*delta.low.factors()))).norm()) > 1
    assert delta.kind == init and delta.facts() == delta.low.facts() and set(delta.refs()) == {"A", "B"}


@pytest.mark.parametrize("init", INITS)
def test_dora_on_it(init: str) -> None:
    W = weight()
    delta, expected = trained(W, init, magnitude=randn(12, 1, seed=8).double())
    assert torch.allclose(applied(delta, W), expected, atol=1e-11)


def test_any_blocks_give_the_same_bytes() -> None:
    W = weight()
    for init in INITS:
        for magnitude in (None, randn(12, 1, seed=8).double()):
            assert blocks_agree(trained(W, init, magnitude=magnitude)[0], W)


def test_a_weight_stored_transposed() -> None:
    W = weight()
    delta, expected = trained(W, "pissa")
    assert torch.allclose(applied(turned(delta), W.T.contiguous()), expected.T, atol=1e-11)


@pytest.mark.parametrize("init", INITS)
def test_factors_that_came_from_elsewhere(init: str) -> None:
    W = weight()
    delta, _ = trained(W, init)
    B0, A0 = start(W, init)
    residual = W.double() - delta.low.scaling * B0 @ A0
    for other in (residual, weight(seed=20)):
        with pytest.raises(UnsupportedError, match=f"did not come from what {init} moves .*apart, expected at most {FAR}"):
            applied(delta, other)
    far, _ = trained(W, init, step=0.8)
    with pytest.raises(UnsupportedError, match="--initial"):
        applied(far, W)


def test_a_part_that_float32_leaves_open() -> None:
    U, _, Vh = torch.linalg.svd(weight().double(), full_matrices=False)
    W = (U * torch.tensor([5.0, 4.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0])) @ Vh
    with pytest.raises(UnsupportedError, match=r"what pissa moved from this weight is not sure: .*found off by up to .* of ‖W‖"):
        applied(trained(W, "pissa")[0], W)
    W = weight().double()
    W[:, 2] = W[:, 1] * (1 + 1e-9)
    with pytest.raises(UnsupportedError, match="what olora moved from this weight is not sure"):
        applied(trained(W, "olora")[0], W)
    W[:, 2] = W[:, 1] = 0
    with pytest.raises(UnsupportedError, match="what olora moved from this weight is not sure"):
        applied(trained(weight(), "olora")[0], W)


def test_a_weight_of_zeros_has_no_part_to_move() -> None:
    with pytest.raises(UnsupportedError, match="did not come from what pissa moves"):
        applied(trained(weight(), "pissa")[0], torch.zeros(12, 9))


def test_what_does_not_meet() -> None:
    delta, _ = trained(weight(), "pissa")
    with pytest.raises(ShapeError, match=r"found \[12, 9\], expected \[9, 12\]"):
        delta.spec(Spec("F32", (9, 12)))
    wide = LowRank(A=to_ref(randn(10, 9, seed=1)), B=to_ref(randn(12, 10, seed=2)), alpha=1.0, layer="linear")
    with pytest.raises(ShapeError, match=r"no weight that pissa could have moved .*expected a matrix with both sides 10"):
        Residual(init="pissa", then=wide).spec(Spec("F32", (12, 9)))


def test_all_of_a_weight_may_be_moved() -> None:
    """At full rank nothing is left of W, and the factors alone are the weight."""
    W = weight()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    low = LowRank(A=to_ref(S.sqrt()[:, None] * Vh), B=to_ref(U * S.sqrt() * 1.01), alpha=9.0, layer="linear")
    assert torch.allclose(applied(Residual(init="pissa", then=low), W), W.double() * 1.01, atol=1e-12)


def test_map_goes_to_the_factors() -> None:
    delta, _ = trained(weight(), "pissa")
    doubled = delta.map(lambda ref: to_ref(read_tensor(ref) * 2))
    assert torch.equal(read_tensor(doubled.low.A), read_tensor(delta.low.A) * 2) and doubled.init == "pissa"
    assert replace(delta, init="olora").kind == "olora"
