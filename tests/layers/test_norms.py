"""row_norms against float64, where digits cancel too; what it must not take over from its surroundings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.layers import _norms
from loratools.layers._norms import row_norms


def exact(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    return torch.linalg.vector_norm(W.double() + scaling * (B.double() @ A.double()), dim=1)


def case(seed: int, rows: int = 30, columns: int = 50, rank: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, columns), (rank, columns), (rows, rank))
    W, A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return W, A, B


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 40), columns=st.integers(1, 60), rank=st.integers(1, 9), scaling=st.floats(-4, 4))
def test_as_good_as_dense(seed: int, rows: int, columns: int, rank: int, scaling: float) -> None:
    W, A, B = case(seed, rows, columns, rank)
    # a row kept at a hundredth of its parts' size has lost a factor of 100 of float32's 6e-8, and sums of 60 terms cost a few more
    torch.testing.assert_close(row_norms(W, A, B, scaling).double(), exact(W, A, B, scaling), rtol=100 * 6e-8 * 4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_16_bits_are_widened_first(dtype: torch.dtype, device: str) -> None:
    W, A, B = (tensor.to(device) for tensor in case(0, 300, 500, dtype=dtype))
    found = row_norms(W, A, B, 0.1)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), exact(W, A, B, 0.1), rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=0)


def test_rows_that_cancel_are_computed_densely(device: str) -> None:
    """Rows where s·bA is −w but for a little: the cheap formula gives noise there, the norm must not."""
    W, A, B = case(1, 200, 64)
    cancelled = torch.arange(0, 200, 3)
    W[cancelled] = -2 * (B[cancelled] @ A) * (1 + 1e-4 * torch.randn(len(cancelled), 1))
    W[7] = -2 * (B[7] @ A)  # to nothing but rounding
    W, A, B = W.to(device), A.to(device), B.to(device)
    found, truth = row_norms(W, A, B, 2.0).double(), exact(W, A, B, 2.0)
    own = W.double().norm(dim=1)
    # such rows are made in float64: what is left of them is right to float32; the others lose at most a factor of 100
    assert ((found - truth).abs() <= 1e-7 * truth)[cancelled].all()
    assert ((found - truth).abs() <= 1e-5 * truth).all()
    cheap = (own**2 + 4 * ((W.double() @ A.double().T).float() * B).sum(1) + 4 * ((B @ (A @ A.T)) * B).sum(1)).clamp_min(0).sqrt()
    assert ((cheap - truth).abs() > 1e-3 * truth)[cancelled].any(), "the case is one where the cheap formula fails"


def test_zero_rows_and_zero_factors(device: str) -> None:
    W, A, B = (tensor.to(device) for tensor in case(2))
    W[3] = 0
    B.zero_()
    found, own = row_norms(W, A, B, 1.0), torch.linalg.vector_norm(W, dim=1)
    assert found[3] == 0
    assert torch.equal(found, own) or (device == "cuda" and torch.allclose(found, own, rtol=2e-7, atol=0)), "‖w‖ before training"


@pytest.mark.parametrize("block", [1, 60, 1 << 22])
def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    W, A, B = case(3, dtype=torch.bfloat16)
    W[4] = -(B[4] @ A)
    expected = row_norms(W, A, B, 1.0)
    monkeypatch.setattr(_norms, "BLOCK", block)
    # a product of one row takes another kernel and sums in another order
    torch.testing.assert_close(row_norms(W, A, B, 1.0), expected, rtol=1e-5, atol=1e-5)


def test_autocast_and_tf32_do_not_reach_it(device: str) -> None:
    W, A, B = (tensor.to(device) for tensor in case(4, 256, 512))
    expected = exact(W, A, B, 1.0)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device, dtype=torch.bfloat16):
            found = row_norms(W, A, B, 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_no_gradient() -> None:
    W, A, B = (tensor.requires_grad_() for tensor in case(5))
    assert not row_norms(W, A, B, 1.0).requires_grad


def test_the_traced_graph_gives_the_same(device: str) -> None:
    torch._dynamo.reset()
    W, A, B = (tensor.to(device) for tensor in case(6))
    W[2] = -(B[2] @ A)
    compiled = torch.compile(lambda *tensors: row_norms(*tensors, 1.0) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(W, A, B), row_norms(W, A, B, 1.0) * 2)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    W, A, B = (tensor.cuda() for tensor in case(7))
    W[2] = -(B[2] @ A)
    expected = row_norms(W, A, B, 1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = row_norms(W, A, B, 1.0)
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
