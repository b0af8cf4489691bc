"""DeLoRA by plain algebra, with norms at their least."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.delora import DeLoRA
from loratools.errors import ShapeError
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def parts(out: int, width: int, rank: int, seed: int) -> dict[str, Tensor]:
    shapes = {"A": (rank, width), "B": (out, rank), "strength": (1,), "w_norm": (width,)}
    return {name: randn(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}


def made(tensors: dict[str, Tensor]) -> DeLoRA:
    return DeLoRA(**{name: to_ref(tensor) for name, tensor in tensors.items()})


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), seeds)
def test_algebra(out: int, width: int, rank: int, seed: int) -> None:
    tensors, W = parts(out, width, rank, seed), randn(out, width, seed=seed + 9)
    tensors["A"][0] *= 1e-7  # a norm below the least
    A, B, strength, w = (tensor.double() for tensor in tensors.values())
    scale = strength / rank / (A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4))
    delta, change = made(tensors), (B * scale) @ A * w
    assert torch.allclose(applied(delta, W), W.double() + change, rtol=1e-12, atol=1e-12)
    assert delta.norm() == pytest.approx(float(change.norm()), rel=1e-7, abs=1e-9) and delta.facts() == {"rank": rank}


def test_any_blocks_give_the_same_bytes() -> None:
    assert blocks_agree(made(parts(37, 29, 3, 0)), randn(37, 29, seed=5))


@pytest.mark.parametrize("change", [{"A": (2, 6)}, {"B": (4, 2)}, {"strength": (2,)}, {"w_norm": (1, 5)}, {"A": (0, 5), "B": (4, 0)}])
def test_parts_that_do_not_meet(change: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ShapeError, match="the parts do not meet"):
        made(parts(4, 5, 3, 0) | {name: randn(*shape, seed=0) for name, shape in change.items()})
