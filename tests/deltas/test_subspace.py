"""Subspace: the smallest singular directions replaced, by a decomposition of its own; refused where float32 does not tell them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.deltas.subspace import Subspace
from loratools.errors import NonFiniteError, ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.deltas.apply import applied, blocks_agree
from tests.strategies import randn


def matrix(values: list[float], rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, U, S, Vᵀ) with these singular values, in float64."""
    U, V = (torch.linalg.qr(randn(size, len(values), seed=size).double())[0] for size in (rows, columns))
    S = torch.tensor(values, dtype=torch.float64)
    return U * S @ V.T, U, S, V.T


def made(rows: int, columns: int, count: int) -> Subspace:
    parts = randn(rows, count, seed=5), randn(count, seed=6), randn(count, columns, seed=7)
    return Subspace(U=to_ref(parts[0]), S=to_ref(parts[1]), V=to_ref(parts[2]))


@pytest.mark.parametrize(("rows", "columns", "kept"), [(9, 6, 2), (5, 8, 4), (6, 6, 1), (6, 6, 6), (6, 6, 0)])
def test_algebra(rows: int, columns: int, kept: int) -> None:
    least = min(rows, columns)
    W, U, S, Vh = matrix([float(least - number) for number in range(least)], rows, columns)
    delta = made(rows, columns, least - kept)
    sizes = (rows, least - kept), (least - kept,), (least - kept, columns)
    left, values, right = (randn(*size, seed=seed).double() for seed, size in enumerate(sizes, 5))
    new = left * values @ right
    assert delta.kept == kept and delta.align is None
    assert torch.allclose(applied(delta, W), (U[:, :kept] * S[:kept]) @ Vh[:kept] + new, rtol=1e-12, atol=1e-12)
    assert blocks_agree(delta, W)


def test_signs_of_singular_vectors_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    W, delta = randn(7, 6, seed=0), made(7, 6, 4)
    before, svd = applied(delta, W), torch.linalg.svd

    def other(X: Tensor, full_matrices: bool) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = svd(X, full_matrices=full_matrices)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
        return U * signs, S, Vh * signs.unsqueeze(1)

    monkeypatch.setattr(torch.linalg, "svd", other)
    assert torch.equal(applied(delta, W), before)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_an_untrained_adapter_changes_nothing_that_its_dtype_shows(dtype: torch.dtype, share: float) -> None:
    """As peft makes it: decomposed in float32, its parts rounded to the weight's dtype, which of bfloat16 is itself 3e-3 of them."""
    W = randn(96, 64, seed=0).to(dtype)
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    parts = [to_ref(part.to(dtype)) for part in (U[:, 32:], S[32:], Vh[32:])]
    delta = Subspace(U=parts[0], S=parts[1], V=parts[2], stored="BF16" if dtype == torch.bfloat16 else "F32")
    bound = delta.bind(Spec("F64", (96, 64)), lambda rows: iter(()))
    assert float((bound(slice(0, 96), W.double()) - W.double()).norm() / W.double().norm()) < share


def test_two_values_that_float32_does_not_tell_apart() -> None:
    W = matrix([4.0, 2.0 + 1e-8, 2.0, 1.0], 6, 5)[0]
    near = made(6, 5, 3)
    with pytest.raises(UnsupportedError, match=r"values 2 and 3 are too near to tell what was kept .*found 2\.00000001 and 2, which leave"):
        applied(near, W)
    apart = made(6, 5, 2)
    assert apart.kept == 3 and torch.isfinite(applied(apart, W)).all()
    zeros = matrix([4.0, 2.0, 0.0, 0.0, 0.0], 6, 5)[0]
    assert torch.isfinite(applied(apart, zeros)).all()  # where nothing is left to tell apart nothing is uncertain either


def test_what_does_not_meet_or_fit() -> None:
    for u, s, v in (((4, 2), (3,), (3, 5)), ((4, 2), (2,), (2,)), ((4, 5), (5,), (5, 5))):
        with pytest.raises(ShapeError, match="the singular vectors and values do not meet"):
            Subspace(U=to_ref(torch.ones(u)), S=to_ref(torch.ones(s)), V=to_ref(torch.ones(v)))
    delta = made(4, 5, 2)
    assert delta.fits(Spec("F32", (4, 5))) and not delta.fits(Spec("F32", (5, 4))) and delta.facts() == {"rank": 2}
    with pytest.raises(ShapeError, match=r"does not fit the base's weight: found \[4, 5\], expected \[4, 5, 1\]"):
        delta.spec(Spec("F32", (4, 5, 1)))
    with pytest.raises(NonFiniteError, match="a weight holds inf or nan"):
        applied(delta, torch.full((4, 5), float("inf")))
