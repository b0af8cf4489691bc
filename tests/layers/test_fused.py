"""The Triton kernels against float64 and against plain torch; where they cannot run, the plain way is taken and told of once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from loratools.layers import _fused
from loratools.layers._dora import DoRALinear, scaled
from loratools.layers._norms import LOST

CUDA = pytest.mark.gpu
needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(m: int, n: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Every seventh row of W is −2·B·A but for its rounding, so that digits cancel there."""
    generator = torch.Generator().manual_seed(m)
    W, A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((m, n), (r, n), (m, r)))
    W[::7] = (-2 * (B[::7].float() @ A.float())).to(dtype)
    return W.cuda(), A.cuda(), B.cuda()


@CUDA
@needs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r"), [(200, 300, 4), (70, 130, 20), (1, 5, 1), (4096, 1024, 64), (33, 4099, 16)])
def test_norms_are_right_to_float32(dtype: torch.dtype, m: int, n: int, r: int) -> None:
    W, A, B = case(m, n, r, dtype)
    truth = torch.linalg.vector_norm(W.double() + 2 * (B.double() @ A.double()), dim=1)
    for own in (W, W.T.contiguous().T):
        assert _fused.usable(own, A, B, rank=r)
        found = _fused.row_norms(own, A, B, 2.0, LOST)
        # rows that cancel are summed in float64; the others lose at most a factor of 50 to 100 of float32's 6e-8
        torch.testing.assert_close(found.double(), truth, rtol=4e-6, atol=1e-30)
        assert torch.equal(found, _fused.row_norms(own, A, B, 2.0, LOST)), "the same bits each time"


@CUDA
@needs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_gain_and_its_gradients(dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 70, 300, device="cuda").to(dtype).requires_grad_()
    gain = (1 + 0.1 * torch.randn(300, device="cuda")).requires_grad_()
    bias = torch.randn(300, device="cuda").to(dtype) if biased else None
    g = torch.randn(3, 70, 300, device="cuda").to(dtype)
    y = scaled(z, gain, bias)
    y.backward(g)
    wide = z.detach().double() * gain.detach().double() + (0 if bias is None else bias.double())
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wide, rtol=unit, atol=unit)  # one rounding, of float32 in float32
    torch.testing.assert_close(z.grad.double(), g.double() * gain.detach().double(), rtol=unit, atol=0)
    # sums of 210 terms in float32
    torch.testing.assert_close(gain.grad.double(), (g.double() * z.detach().double()).sum((0, 1)), rtol=1e-5, atol=1e-4)


@CUDA
@needs
@pytest.mark.parametrize("turned", [False, True])
def test_a_gradient_has_a_gradient(turned: bool) -> None:
    z, gain = torch.randn(8, 4, device="cuda").T.requires_grad_(), torch.rand(8, device="cuda", requires_grad=True)
    z = z if turned else z.detach().contiguous().requires_grad_()
    first = torch.autograd.grad(_fused.gained(z, gain, None).square().sum(), z, create_graph=True)[0]
    first.sum().backward()
    torch.testing.assert_close(gain.grad, (4 * z * gain).sum(0).detach())


@CUDA
@needs
def test_a_fresh_layer_changes_nothing() -> None:
    layer = DoRALinear(nn.Linear(300, 200, device="cuda", dtype=torch.bfloat16), rank=4, alpha=8)
    assert torch.equal(layer.gain(), torch.ones(200, device="cuda"))


@CUDA
@needs
def test_what_cannot_be_compiled_is_told_once_and_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> Tensor:
        raise RuntimeError("no C compiler")

    _fused.compiles.cache_clear()
    monkeypatch.setattr(_fused, "gained", failing)
    W, A, B = case(20, 30, 2, torch.float32)
    with pytest.warns(UserWarning, match="the slower way, since Triton cannot compile: no C compiler"):
        assert not _fused.usable(W, A, B, rank=2)
    assert not _fused.usable(W, A, B, rank=2)
    _fused.compiles.cache_clear()


@CUDA
@needs
@pytest.mark.parametrize("rank", [65, 200])
def test_large_ranks_go_the_plain_way(rank: int) -> None:
    W, A, B = case(20, 300, rank, torch.float32)
    assert not _fused.usable(W, A, B, rank=rank)


def test_the_cpu_goes_the_plain_way() -> None:
    assert not _fused.usable(torch.ones(2, 2), torch.ones(1, 2), rank=1)
