"""UniLoRA: a LoRA whose numbers are looked up in one vector."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.unilora import UniLoRA
from loratools.errors import FormatError, ShapeError
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def parts(out: int, width: int, rank: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"theta": randn(6, seed=seed)}
    for side, shape in (("a", (rank, width)), ("b", (out, rank))):
        tensors[f"indices_{side}"] = torch.randint(0, 6, shape, generator=generator)
        tensors[f"scales_{side}"] = randn(*shape, seed=seed + ord(side))
    return tensors


def made(tensors: dict[str, Tensor]) -> UniLoRA:
    return UniLoRA(**{name: to_ref(tensor) for name, tensor in tensors.items()})


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), seeds)
def test_algebra(out: int, width: int, rank: int, seed: int) -> None:
    tensors, W = parts(out, width, rank, seed), randn(out, width, seed=seed + 1)
    theta = tensors["theta"].double()
    B, A = (theta[tensors[f"indices_{side}"]] * tensors[f"scales_{side}"].double() for side in "ba")
    assert torch.allclose(applied(made(tensors), W), W.double() + B @ A, rtol=1e-12, atol=1e-12)


def test_any_blocks_give_the_same_bytes_and_facts() -> None:
    delta = made(parts(11, 7, 3, 0))
    assert blocks_agree(delta, randn(11, 7, seed=1)) and delta.reproducible
    assert delta.shape() == (11, 7) and delta.facts() == {"rank": 3}
    B, A = delta.product()
    assert delta.norm() == pytest.approx(float((B @ A).norm()), rel=1e-9)


@pytest.mark.parametrize("name", ["theta", "indices_a", "indices_b", "scales_a", "scales_b"])
def test_what_does_not_meet(name: str) -> None:
    tensors = parts(5, 4, 2, 0)
    with pytest.raises(ShapeError, match="the indices, scales and θ do not meet"):
        made(tensors | {name: tensors[name].unsqueeze(0)})


def test_indices_point_into_theta() -> None:
    tensors = parts(5, 4, 2, 0)
    with pytest.raises(FormatError, match="whole numbers"):
        made(tensors | {"indices_a": tensors["indices_a"].float()})
    with pytest.raises(FormatError, match="a place outside"):
        made(tensors | {"indices_a": tensors["indices_a"] + 6}).product()
