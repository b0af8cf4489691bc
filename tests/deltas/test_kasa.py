"""KaSA: the smallest singular components taken off, a scaled product added, by float64 algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loratools.deltas.kasa import KaSA
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn


def made(out: int, into: int, rank: int, **more: object) -> KaSA:
    tensors = {"A": randn(rank, into, seed=1), "B": randn(out, rank, seed=2), "d": randn(rank, seed=3)}
    return KaSA(**{name: to_ref(tensor) for name, tensor in tensors.items()}, alpha=3.0, **more)  # type: ignore[arg-type]


def formula(delta: KaSA, W: Tensor) -> Tensor:
    B, A, d = randn(*delta.B.spec.shape, seed=2).double(), randn(*delta.A.spec.shape, seed=1).double(), randn(delta.rank, seed=3).double()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    keep = min(W.shape) - delta.rank
    return (U[:, :keep] * S[:keep]) @ Vh[:keep] + delta.scaling * B @ torch.diag(d) @ A


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (12, 12), (2, 5)])
def test_algebra(shape: tuple[int, int], rslora: bool) -> None:
    W, delta = randn(*shape, seed=7), made(*shape, rank=min(shape) // 2, rslora=rslora)
    assert torch.allclose(applied(delta, W), formula(delta, W), rtol=1e-11, atol=1e-11)
    assert delta.facts() == {"rank": delta.rank, "alpha": 3.0, "scaling": delta.scaling}


def test_any_blocks_give_the_same_bytes() -> None:
    assert blocks_agree(made(12, 12, 3), randn(12, 12, seed=7))


def test_float64_weights_keep_their_digits() -> None:
    W, delta = randn(8, 6, seed=7).double() * (1 + 1e-12), made(8, 6, 2)
    assert float((applied(delta, W) - formula(delta, W)).abs().max()) < 1e-13 * float(W.abs().max()) * 10


def test_what_does_not_meet() -> None:
    delta = made(8, 6, 2)
    for name, shape in (("d", (3,)), ("A", (3, 6)), ("B", (8, 3)), ("A", (6,))):
        with pytest.raises(ShapeError, match="the parts do not meet"):
            replace(delta, **{name: to_ref(randn(*shape, seed=0))})
    with pytest.raises(ShapeError, match=r"found \[8, 6\], expected \[6, 8\]"):
        delta.spec(Spec("F32", (6, 8)))
    with pytest.raises(ShapeError, match="the base lacks"):
        delta.spec(None)
    with pytest.raises(ShapeError, match="take away all singular components of the weight: found rank 6, expected below 6"):
        made(8, 6, 6).spec(Spec("F32", (8, 6)))
    with pytest.raises(UnsupportedError, match="not a plain floating-point"):
        delta.spec(Spec("I8", (8, 6)))


def test_singular_values_that_float32_cannot_tell_apart() -> None:
    U, _, Vh = torch.linalg.svd(randn(8, 6, seed=7).double(), full_matrices=False)
    sigma = torch.tensor([5.0, 4.0, 3.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    W = (U * sigma) @ Vh
    with pytest.raises(UnsupportedError, match=r"not sure: .*found 2 and 2; merge with peft"):
        applied(made(8, 6, 2), W)
    applied(made(8, 6, 1), W)
    applied(made(8, 6, 3), W)
