"""A convolution's LoRA with its kernel between the factors, against the einsum of LyCORIS."""

from __future__ import annotations

import pytest
import torch

from loratools.deltas.tucker import Tucker
from loratools.errors import ShapeError
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn


def made(kernel: tuple[int, ...] = (2, 3)) -> Tucker:
    up, mid, down = randn(5, 2, seed=0), randn(2, 2, *kernel, seed=1), randn(2, 4, seed=2)
    return Tucker(up=to_ref(up), mid=to_ref(mid), down=to_ref(down), alpha=3.0)


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 1, 2)])
def test_algebra_and_blocks(kernel: tuple[int, ...]) -> None:
    W = randn(5, 4, *kernel, seed=3)
    up, mid, down = randn(5, 2, seed=0).double(), randn(2, 2, *kernel, seed=1).double(), randn(2, 4, seed=2).double()
    change = torch.einsum("mn...,om,ni->oi...", mid, up, down)
    delta = made(kernel)
    assert torch.allclose(applied(delta, W), W.double() + 1.5 * change, rtol=1e-12, atol=1e-12) and blocks_agree(delta, W)
    B, A = delta.product()
    assert torch.allclose((B @ A).view(W.shape), 1.5 * change, rtol=1e-12, atol=1e-12)
    assert delta.facts() == {"rank": 2, "alpha": 3.0, "scaling": 1.5} and delta.norm() == pytest.approx(float(1.5 * change.norm()))


def test_factors_that_do_not_meet() -> None:
    parts = {"up": randn(5, 2, seed=0), "mid": randn(2, 3, 3, seed=1), "down": randn(3, 4, seed=2)}
    Tucker(**{name: to_ref(tensor) for name, tensor in parts.items()}, alpha=1.0)
    for name, tensor in {"up": randn(5, 3, seed=0), "mid": randn(3, 2, 3, seed=0), "down": randn(2, 4, seed=0)}.items():
        with pytest.raises(ShapeError, match="do not meet"):
            Tucker(**{key: to_ref(value) for key, value in (parts | {name: tensor}).items()}, alpha=1.0)
