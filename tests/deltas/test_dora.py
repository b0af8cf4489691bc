"""DoRA: the axis is where the magnitude has size 1; norms have no epsilon; both axes in any blocking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.errors import ShapeError, UnsupportedError
from loratools.refs import Spec
from loratools.tensors import to_ref
from tests.strategies import dora, low_rank, randn, seeds


def applied(delta: Delta, W: Tensor) -> Tensor:
    """W′ by one block of all rows; a first pass reads the blocks it asks for."""
    wide = W.double()

    def read(rows: int):  # type: ignore[no-untyped-def]
        flat = wide.reshape(wide.shape[0], -1)
        return ((slice(i, min(i + rows, len(flat))), flat[i : i + rows].clone()) for i in range(0, len(flat), rows))

    spec = Spec("F64", tuple(W.shape))
    return delta.bind(spec, read)(slice(0, W.shape[0]), wide.reshape(W.shape[0], -1).clone()).reshape(W.shape)


@given(st.integers(1, 300), st.integers(1, 30), st.integers(1, 4), st.sampled_from(["out", "in"]), seeds)
def test_matrices_along_both_axes(rows: int, columns: int, rank: int, axis: str, seed: int) -> None:
    drawn = dora(low_rank((rows, columns), rank, seed), axis, seed)
    assert torch.allclose(applied(drawn.delta, drawn.W), drawn.dense(drawn.W.double()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 3, 2), (4, 3, 1, 1), (4, 3, 2, 2, 2), (1, 3, 2)])
def test_convolutions_have_one_norm_an_output(shape: tuple[int, ...]) -> None:
    drawn = dora(low_rank(shape, 2, 0), "out", 1)
    assert torch.allclose(applied(drawn.delta, drawn.W), drawn.dense(drawn.W.double()), rtol=1e-9)


def test_a_start_from_its_own_norms_changes_nothing() -> None:
    """A magnitude of ‖W‖ and B = 0, as training begins: W′ = W to rounding."""
    W = randn(5, 7, seed=0)
    none = Full(diff=to_ref(torch.zeros(5, 7)))
    for axis in (0, 1):
        delta = DoRA(direction=none, magnitude=to_ref(W.double().square().sum(1 - axis, keepdim=True).sqrt()))
        assert torch.allclose(applied(delta, W), W.double(), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("shape", "magnitude", "axis"),
    [
        ((4, 6), (4, 1), "out"),
        ((4, 6), (1, 6), "in"),
        ((1, 6), (1, 1), "out"),
        ((4, 1), (1, 1), "in"),
        ((1, 1), (1, 1), "out"),
        ((4, 4), (1, 4), "in"),
    ],
)
def test_the_axis_is_where_the_magnitude_has_size_one(shape: tuple[int, int], magnitude: tuple[int, int], axis: str) -> None:
    delta = DoRA(direction=Full(diff=to_ref(torch.ones(shape))), magnitude=to_ref(torch.ones(magnitude)))
    assert delta.axis == axis and delta.spec(Spec("F32", shape)) == Spec("F32", shape)


@pytest.mark.parametrize("magnitude", [(4,), (6,), (4, 6), (6, 1), (1, 4), (4, 1, 2)])
def test_magnitudes_that_do_not_fit(magnitude: tuple[int, ...]) -> None:
    delta = DoRA(direction=Full(diff=to_ref(torch.ones(4, 6))), magnitude=to_ref(torch.ones(magnitude)))
    with pytest.raises(ShapeError):
        delta.spec(Spec("F32", (4, 6)))


@pytest.mark.parametrize("kernel", [(3,), (2, 3)])
def test_a_convolution_by_inputs_has_one_norm_a_channel(kernel: tuple[int, ...]) -> None:
    W, m = randn(5, 4, *kernel, seed=0), 1 + randn(4, seed=1).square()
    V = W.double() + 0.5
    axes = (0, *range(2, W.ndim))
    expected = m.double().reshape(1, 4, *(1,) * len(kernel)) * V / V.square().sum(axes, keepdim=True).sqrt()
    direction = Full(diff=to_ref(torch.full(W.shape, 0.5)))
    for shape in ((1, 4), (1, 4, *(1,) * len(kernel))):
        delta = DoRA(direction=direction, magnitude=to_ref(m.reshape(shape)))
        assert torch.allclose(applied(delta, W), expected, rtol=1e-12)
        assert delta.fitted(Spec("F32", tuple(W.shape))).magnitude.spec.shape == (1, 4, *(1,) * len(kernel))


def test_a_kernel_of_one_is_a_matrix_however_it_is_spelt() -> None:
    drawn = dora(low_rank((6, 4), 2, 0), "out", 1)
    assert isinstance(drawn.delta, DoRA)
    spec = Spec("F32", (6, 4, 1, 1))
    fitted = drawn.delta.fitted(spec)
    assert drawn.delta.fits(spec) and fitted.direction.shape() == (6, 4, 1, 1) and fitted.magnitude.spec.shape == (6, 1, 1, 1)
    assert torch.allclose(applied(fitted, drawn.W[..., None, None])[..., 0, 0], drawn.dense(drawn.W.double()), rtol=1e-9)


def test_a_transpose_turns_the_axis() -> None:
    drawn = dora(low_rank((6, 4), 2, 0), "out", 1)
    assert isinstance(drawn.delta, DoRA)
    turned = drawn.delta.transposed()
    assert turned.axis == "in"
    assert torch.allclose(applied(turned, drawn.W.T), drawn.dense(drawn.W.double()).T, rtol=1e-9)
    with pytest.raises(UnsupportedError):
        DoRA(direction=Full(diff=to_ref(torch.ones(4, 6))), magnitude=to_ref(torch.ones(4, 1))).transposed()
