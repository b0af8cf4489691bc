"""RandLoRA: a sum of scaled bases, side by side in one product, as peft numbers them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.randlora import RandLoRA
from loratools.deltas.seeded import Bases
from loratools.errors import FormatError, ShapeError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn, seeds


def parts(out: int, width: int, rank: int, seed: int) -> dict[str, Tensor]:
    short, long = sorted((out, width))
    count = -(-short // rank)
    shapes = {"lambdas": (rank, count), "gamma": (count, short), "A": (rank, 1, short + 2), "B": (long + 3, count + 1, rank)}
    return {name: randn(*shape, seed=seed + place) for place, (name, shape) in enumerate(shapes.items())}


def made(tensors: dict[str, Tensor], scale: float = 0.5, **more: object) -> RandLoRA:
    return RandLoRA(**{name: to_ref(tensor) for name, tensor in tensors.items()}, scale=scale, **more)  # type: ignore[arg-type]


def algebra(tensors: dict[str, Tensor], out: int, width: int) -> Tensor:
    """Σᵢ B[:, i]·rows i of the scaled A, where i runs over (base, rank) in B and over (rank, base) in A."""
    lambdas, gamma, A, B = (tensors[name].double() for name in ("lambdas", "gamma", "A", "B"))
    rank, count = lambdas.shape
    short, long = sorted((out, width))
    lefts = [B[:long, base, k] for base in range(count) for k in range(rank)]
    rights = [lambdas[k, base] * A[k, 0, :short] * gamma[base] for k in range(rank) for base in range(count)]
    total = torch.zeros(long, short, dtype=torch.float64)
    for left, right in zip(lefts, rights, strict=True):
        total += torch.outer(left, right)
    return total if width <= out else total.T


@given(st.integers(1, 15), st.integers(1, 15), st.integers(1, 17), seeds)
def test_algebra(out: int, width: int, rank: int, seed: int) -> None:
    tensors, W = parts(out, width, rank, seed), randn(out, width, seed=seed + 9)
    expected = W.double() + 0.5 * algebra(tensors, out, width)
    assert torch.allclose(applied(made(tensors), W), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("out, width", [(23, 9), (9, 23), (9, 9)])
def test_any_blocks_give_the_same_bytes(out: int, width: int) -> None:
    assert blocks_agree(made(parts(out, width, 4, 0)), randn(out, width, seed=5))


def test_it_is_fitted_to_a_weight_by_its_smaller_side() -> None:
    delta = made(parts(7, 11, 3, 0), alpha=1.5)
    assert delta.shape() == (7,) and delta.facts() == {"rank": 3, "alpha": 1.5, "scaling": 0.5} and delta.product() is None
    fitted = delta.fitted(Spec("F32", (7, 11)))
    assert fitted.shape() == (7, 11) and fitted.spec(Spec("F32", (7, 11))) == Spec("F32", (7, 11))
    assert fitted.norm() == pytest.approx(0.5 * float(algebra(parts(7, 11, 3, 0), 7, 11).norm()), rel=1e-9)
    assert delta.fits(Spec("F32", (14, 7))) and not delta.fits(Spec("F32", (15, 7))) and not delta.fits(Spec("F32", (8, 11)))
    with pytest.raises(ShapeError, match=r"found \[8, 11\], expected a matrix whose smaller side is 7, the larger at most 14"):
        delta.spec(Spec("F32", (8, 11)))


def test_drawn_bases_promise_no_bits_to_other_machines() -> None:
    bank, tensors = Bases(seed=3, rank=4, sparse=True, out=12, width=10), parts(9, 10, 4, 0)
    A, B = bank.tensors
    drawn = made({name: tensors[name] for name in ("lambdas", "gamma")}, bank=bank)
    stored = made(tensors | {"A": A, "B": B})
    W = randn(9, 10, seed=1)
    assert torch.equal(applied(drawn, W), applied(stored, W)) and stored.reproducible and not drawn.reproducible
    assert drawn.fits(Spec("F32", (99, 9))) and drawn.draws == (bank, (9,))
    with pytest.raises(ShapeError, match=r"expected a matrix whose smaller side is 9$"):
        drawn.spec(Spec("F32", (8, 11)))


WRONG = [("lambdas", (3, 2)), ("gamma", (2, 7)), ("A", (3, 2, 9)), ("A", (3, 1, 6)), ("B", (14, 2, 3)), ("B", (14, 4, 2))]


@pytest.mark.parametrize("name, shape", WRONG)
def test_what_does_not_meet(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="the bases and their diagonals do not meet"):
        made(parts(7, 11, 3, 0) | {name: randn(*shape, seed=0)})


def test_copies_are_equal_or_an_error() -> None:
    tensors, W = parts(7, 11, 3, 0), randn(7, 11, seed=1)
    assert torch.equal(applied(made(tensors | {"copy_a": tensors["A"], "copy_b": tensors["B"]}), W), applied(made(tensors), W))
    with pytest.raises(FormatError, match="a module's copy of a shared basis differs"):
        applied(made(tensors | {"copy_b": tensors["B"] + 1}), W)
    with pytest.raises(ShapeError, match=r"a module's copy of a shared basis is another: found F32 \[3, 1, 8\], expected F32 \[3, 1, 9\]"):
        made(tensors | {"copy_a": tensors["A"][:, :, :-1].contiguous()})
