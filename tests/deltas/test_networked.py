"""Networked: a network over the columns of a weight, by torch's own layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loratools.deltas.networked import KNOWN, OWN_PARAMETERS, Networked
from loratools.errors import ShapeError, UnsupportedError
from loratools.linalg.activations import ACTIVATIONS
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn


def layer(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        made.weight.copy_(weight)
    return made


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("name", ["relu", "tanh"])
@torch.no_grad()
def test_algebra(depth: int, name: str) -> None:
    rows, columns, rank = 140, 9, 4  # more rows than are read at once
    A, B, W = randn(rank, rows, seed=0), randn(rows, rank, seed=1), randn(rows, columns, seed=2)
    inner = [randn(rank, rank, seed=3 + number) for number in range(2 * depth)]
    f = getattr(torch, name)
    h, given = f(layer(A)(W.T.double())), []
    for E in inner[:depth]:
        given.append(h)
        h = f(layer(E)(h))
    for number, D in enumerate(inner[depth:]):
        h = f(layer(D)(h)) + given[depth - 1 - number]
    delta = Networked(
        A=to_ref(A), B=to_ref(B), encoders=tuple(map(to_ref, inner[:depth])), decoders=tuple(map(to_ref, inner[depth:])), activation=name,
        scale=0.7,
    )  # fmt: skip
    assert torch.allclose(applied(delta, W), W.double() + 0.7 * layer(B)(h).T, rtol=1e-10, atol=1e-10)
    assert blocks_agree(delta, W) and delta.facts() == {"rank": rank, "scaling": 0.7}
    assert len(delta.refs()) == 2 + 2 * depth and torch.equal(applied(delta.map(lambda ref: ref), W), applied(delta, W))


@pytest.mark.parametrize("name", KNOWN)
def test_activations_are_those_of_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    # gelu_fast has √(2/π) to ten digits: a relative 1e-11 of an x up to 12
    assert torch.allclose(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=1e-9, atol=1e-12)


def test_every_activation_of_transformers_is_known() -> None:
    from transformers.activations import ACT2CLS

    assert set(KNOWN) == set(ACTIVATIONS) == set(ACT2CLS) - set(OWN_PARAMETERS)


@pytest.mark.parametrize(("name", "why"), [("prelu", "has parameters that the adapter does not save"), ("nix", "is not known")])
def test_an_activation_that_is_not_done(name: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"the activation {name} {why}: expected gelu"):
        Networked(A=to_ref(torch.ones(1, 2)), B=to_ref(torch.ones(2, 1)), activation=name)


def test_what_does_not_meet_or_fit() -> None:
    def made(a: tuple[int, ...], b: tuple[int, ...], *inner: tuple[int, ...]) -> Networked:
        encoders = tuple(to_ref(torch.ones(shape)) for shape in inner)
        return Networked(A=to_ref(torch.ones(a)), B=to_ref(torch.ones(b)), encoders=encoders[:1], decoders=encoders[1:])

    for shapes in (((2, 3), (2, 3)), ((2,), (2,)), ((0, 3), (3, 0)), ((2, 3), (3, 2), (2, 2)), ((2, 3), (3, 2), (2, 3), (2, 2))):
        with pytest.raises(ShapeError, match="the layers do not meet"):
            made(*shapes)
    delta = made((2, 3), (3, 2), (2, 2), (2, 2))
    assert delta.fits(Spec("F32", (3, 9))) and not delta.fits(Spec("F32", (9, 3)))
    with pytest.raises(ShapeError, match="changes other rows than the weight has: found 3, expected 9"):
        delta.spec(Spec("F32", (9, 3)))
