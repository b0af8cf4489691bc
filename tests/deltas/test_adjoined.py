"""Adjoined (LyCORIS' GLoRA) against plain float64 algebra, of matrices and of convolutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.adjoined import Adjoined
from loratools.errors import ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds

NAMES = ("a1", "a2", "b1", "b2")


def factors(out: int, width: int, rank: int, *kernel: int, seed: int) -> dict[str, Tensor]:
    shapes = ((width, rank), (rank, width), (out, rank), (rank, width, *kernel))
    return {name: randn(*shape, seed=seed + i) for i, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))}


def made(tensors: dict[str, Tensor], alpha: float = 3.0) -> Adjoined:
    return Adjoined(**{name: to_ref(tensor) for name, tensor in tensors.items()}, alpha=alpha)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), seeds)
def test_matrices(out: int, width: int, rank: int, seed: int) -> None:
    tensors, W = factors(out, width, rank, seed=seed), randn(out, width, seed=seed + 9).double()
    a1, a2, b1, b2 = (tensors[name].double() for name in NAMES)
    expected = W + 3.0 / rank * (W @ a1 @ a2 + b1 @ b2)
    assert torch.allclose(applied(made(tensors), W), expected, rtol=1e-11, atol=1e-11)
    assert made(tensors).facts() == {"rank": rank, "alpha": 3.0, "scaling": 3.0 / rank}


def test_a_convolution_mixes_its_channels_at_each_place() -> None:
    tensors, W = factors(5, 4, 2, 3, 2, seed=0), randn(5, 4, 3, 2, seed=9).double()
    a1, a2, b1, b2 = (tensors[name].double() for name in NAMES)
    change = torch.einsum("oikl,ir,rj->ojkl", W, a1, a2) + torch.einsum("or,rikl->oikl", b1, b2)
    assert torch.allclose(applied(made(tensors), W), W + 1.5 * change, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_any_blocks_give_the_same_bytes(kernel: tuple[int, ...]) -> None:
    assert blocks_agree(made(factors(37, 11, 3, *kernel, seed=0)), randn(37, 11, *kernel, seed=5))


@pytest.mark.parametrize(("name", "shape"), [("a1", (4, 3)), ("a2", (4, 2)), ("b1", (5, 3)), ("b2", (2, 5)), ("b1", (5, 2, 1))])
def test_factors_that_do_not_meet(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="the factors do not meet"):
        made(factors(5, 4, 2, seed=0) | {name: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(5, 5), (4, 4), (5, 4, 3)])
def test_weights_it_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="does not fit the base's weight"):
        made(factors(5, 4, 2, seed=0)).spec(Spec("F32", shape))
    assert made(factors(5, 4, 2, seed=0)).spec(Spec("F32", (5, 4, 1, 1))).shape == (5, 4, 1, 1)
