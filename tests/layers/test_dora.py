"""DoRA's own: the magnitudes' two axes, the detached norm's gradient, a base that changes, rows of zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loratools.errors import OptionError, UnsupportedError
from loratools.layers import DoRAConv2d, DoRAEmbedding, DoRALinear, layer_for
from tests.layers.cases import DORA, changed, dense, inputs, layer, plain_output


def test_magnitudes_start_at_the_norms_of_their_axis(device: str) -> None:
    linear, table, conv = (module.to(device) for module in (nn.Linear(5, 3), nn.Embedding(7, 4), nn.Conv2d(2, 3, 3)))
    turned = Conv1D(3, 5).to(device)
    expected = {
        DoRALinear(linear, rank=1, alpha=1): linear.weight.norm(dim=1),
        DoRALinear(linear, rank=1, alpha=1, axis="in"): linear.weight.norm(p=2, dim=0, keepdim=True)[0],  # the tutorial's m
        DoRALinear(turned, rank=1, alpha=1): turned.weight.norm(dim=0),
        DoRALinear(turned, rank=1, alpha=1, axis="in"): turned.weight.norm(dim=1),
        DoRAEmbedding(table, rank=1, alpha=1): table.weight.norm(dim=0),
        DoRAEmbedding(table, rank=1, alpha=1, axis="in"): table.weight.norm(dim=1),
        DoRAConv2d(conv, rank=1, alpha=1): conv.weight.flatten(1).norm(dim=1),
    }
    for made, norms in expected.items():
        torch.testing.assert_close(made.magnitude, norms)  # float32: sums in another order


def test_the_magnitude_stays_wide_on_a_narrow_base() -> None:
    made = DoRALinear(nn.Linear(5, 3, dtype=torch.bfloat16), rank=1, alpha=1)
    assert made.magnitude.dtype == torch.float32 and made.lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize("name", DORA)
def test_gradients_with_the_norm_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 4.3 of the paper: the norm is a constant to the gradient. Held still, gradcheck agrees; moving, it must not."""
    torch.manual_seed(0)
    made, x = changed(layer("dora", name, dtype=torch.float64)), inputs(name, dtype=torch.float64)
    if not x.is_floating_point():
        x[x == made.padding_idx] = 0  # whose row of A gets no gradient on purpose
    held = made.norms()
    if name == "embedding, in":  # takes the norms of the rows it looks up, in place
        monkeypatch.setattr(torch.linalg, "vector_norm", lambda V, dim, dtype: held[x])
    monkeypatch.setattr(made, "norms", lambda: held)
    variables = [made.lora_A, made.lora_B, made.magnitude] + ([x.requires_grad_()] if x.is_floating_point() else [])

    def output(A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
        return torch.func.functional_call(made, {"lora_A": A, "lora_B": B, "magnitude": m}, (x,))

    assert torch.autograd.gradcheck(output, variables)
    monkeypatch.undo()
    assert not torch.autograd.gradcheck(output, variables, raise_exception=False), "the norm is not part of the gradient"


@pytest.mark.parametrize("name", DORA)
@pytest.mark.parametrize("way", ["data", "in place", "state dict", "assigned", "moved"])
def test_the_norm_follows_a_base_that_changes(name: str, way: str, device: str) -> None:
    made, x = changed(layer("dora", name, device)), inputs(name, device)
    made(x)
    other = torch.randn_like(made.weight)
    with torch.no_grad():
        if way == "data":
            made.weight.data.copy_(other)
        elif way == "in place":
            made.weight.copy_(other)
        elif way == "state dict":
            made.load_state_dict(made.state_dict() | {"weight": other})
        elif way == "assigned":
            made.weight = nn.Parameter(other, requires_grad=False)
        else:
            made.to(torch.bfloat16).to(torch.float32)
    expected = plain_output(made, name, dense(made), x)
    assert (made(x) - expected).norm() <= 16 * 2**-23 * expected.norm()  # as in test_base.py


@pytest.mark.parametrize("name", ["linear", "linear, in", "embedding", "embedding, in"])
def test_a_row_of_zeros_stays_zero(name: str, device: str) -> None:
    base = nn.Embedding(20, 6).to(device) if name.startswith("embedding") else nn.Linear(12, 6, bias=False).to(device)
    with torch.no_grad():
        base.weight[2], base.weight[:, 1] = 0, 0
    x = inputs(name, device)
    made = layer("dora", name, base=base)
    torch.testing.assert_close(made(x), base(x))  # float32 rounding
    made(x).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in made.parameters() if parameter.grad is not None)
    made.merge()
    assert torch.isfinite(made.weight).all() and not made.weight[2].any()


def test_gain_keeps_its_digits_in_16_bits() -> None:
    """1.0105 is 1.0078 in bfloat16; over many outputs the gain must not be."""
    torch.manual_seed(0)
    base = nn.Linear(64, 4096, bias=False, dtype=torch.bfloat16)
    made, x = DoRALinear(base, rank=1, alpha=1), torch.randn(8, 64, dtype=torch.bfloat16)
    before = made(x).double()
    with torch.no_grad():
        made.magnitude.mul_(1.0105)
    gain = (made(x).double() * before).sum() / (before * before).sum()
    # each output is rounded by up to 2⁻⁹ of itself, without bias: over 32768 of them 2⁻⁹/√32768 remain, times 20 to be safe
    assert abs(gain - 1.0105) < 2e-4


def test_refusals() -> None:
    with pytest.raises(OptionError, match="axis"):
        DoRALinear(nn.Linear(2, 2), rank=1, alpha=1, axis="row")
    for base, axis in ((nn.Conv1d(2, 2, 1), "out"), (nn.Conv2d(2, 2, 1), "in")):
        with pytest.raises(UnsupportedError, match="DoRA"):
            layer_for(base, dora=True, axis=axis, rank=1, alpha=1)


def test_no_norm_is_part_of_the_state() -> None:
    made = changed(layer("dora", "linear"))
    assert set(made.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "magnitude"}
