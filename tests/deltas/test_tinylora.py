"""TinyLoRA: a small core between singular vectors, the weighted sum of random ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.seeded import normal
from loratools.deltas.tinylora import TinyLoRA
from loratools.errors import ShapeError
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def parts(out: int, width: int, rank: int, count: int, seed: int) -> dict[str, Tensor]:
    shapes = {"A": (rank, width), "B": (out, rank), "v": (count,), "P": (count, rank, rank)}
    return {name: randn(*shape, seed=seed + place) for place, (name, shape) in enumerate(shapes.items())}


def made(tensors: dict[str, Tensor], seed: int | None = None) -> TinyLoRA:
    return TinyLoRA(seed=seed, **{name: to_ref(tensor) for name, tensor in tensors.items()})


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), seeds)
def test_algebra(out: int, width: int, rank: int, count: int, seed: int) -> None:
    tensors, W = parts(out, width, rank, count, seed), randn(out, width, seed=seed + 7)
    A, B, v, P = (tensors[name].double() for name in "ABvP")
    expected = W.double() + B @ torch.einsum("i,ijk->jk", v, P) @ A
    assert torch.allclose(applied(made(tensors), W), expected, rtol=1e-11, atol=1e-11)


def test_any_blocks_give_the_same_bytes_and_facts() -> None:
    delta = made(parts(11, 7, 3, 4, 0))
    assert blocks_agree(delta, randn(11, 7, seed=1)) and delta.reproducible
    assert delta.shape() == (11, 7) and delta.facts() == {"rank": 3}
    B, A = delta.product()
    assert delta.norm() == pytest.approx(float((B @ A).norm()), rel=1e-9)


def test_drawn_projections_promise_no_bits_to_other_machines() -> None:
    tensors = parts(11, 7, 3, 4, 0)
    drawn, W = made({name: tensors[name] for name in "ABv"}, seed=8), randn(11, 7, seed=1)
    assert torch.equal(applied(drawn, W), applied(made(tensors | {"P": normal(8, 4, 3)}), W)) and not drawn.reproducible


@pytest.mark.parametrize("name, shape", [("A", (2, 7)), ("B", (11, 4)), ("v", (3,)), ("v", (4, 1)), ("P", (4, 3)), ("P", (4, 3, 2))])
def test_what_does_not_meet(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="the factors, projections and vector do not meet"):
        made(parts(11, 7, 3, 4, 0) | {name: randn(*shape, seed=0)})
