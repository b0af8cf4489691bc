"""loralib 0.1.2, live: the same state dict gives the same outputs, before and after merging; its convolutions by the codec."""

from __future__ import annotations

import loralib
import pytest
import torch
from torch import Tensor, nn

from loratools.formats.base import Container, ReadOptions
from loratools.formats.loralib import decode
from loratools.layers import LoRAConv1d, LoRAEmbedding, LoRALayer, LoRALinear, LoRAMergedLinear, attach, lora_state_dict
from loratools.tensors import to_ref

# float32: the two sum at most 30 products in orders of their own, and an output may be a small difference of them
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def pair(theirs: nn.Module, ours: LoRALayer) -> tuple[nn.Module, LoRALayer]:
    """loralib's layer with random values, and ours with its state dict."""
    randomised(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fan", [True, False])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "MergedLinear [1, 0, 1]", "MergedLinear [0, 1]", "Embedding"])
def test_same_state_dict_same_output(kind: str, bias: bool, fan: bool, merge: bool) -> None:
    torch.manual_seed(0)
    settings = {"rank": 3, "alpha": 7, "merge_on_eval": merge}
    theirs_settings = {"r": 3, "lora_alpha": 7, "merge_weights": merge}
    if kind == "Embedding":
        theirs, ours = pair(loralib.Embedding(30, 12, **theirs_settings), LoRAEmbedding(nn.Embedding(30, 12), **settings))
        x = torch.randint(0, 30, (4, 5))
    else:
        x = torch.randn(4, 5, 30)
        base = nn.Linear(30, 12, bias=bias)
        if kind == "Linear":
            made: nn.Module = loralib.Linear(30, 12, fan_in_fan_out=fan, bias=bias, **theirs_settings)
            layer: LoRALayer = LoRALinear(base, fan_in_fan_out=fan, **settings)
        else:
            enable = [flag == "1" for flag in kind.split("[")[1] if flag in "01"]
            made = loralib.MergedLinear(30, 12, enable_lora=enable, fan_in_fan_out=fan, bias=bias, **theirs_settings)
            layer = LoRAMergedLinear(base, enable_lora=enable, fan_in_fan_out=fan, **settings)
        theirs, ours = pair(made, layer)
    for mode in (True, False, True):
        theirs.train(mode), ours.train(mode)
        assert ours.merged == theirs.merged == (merge and not mode)
        torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
        torch.testing.assert_close(ours.weight, theirs.weight, **TOLERANCE)


class Theirs(nn.Module):
    def __init__(self, kernel: int, **settings: object) -> None:
        super().__init__()
        self.body = loralib.Conv2d(4, 6, kernel, r=2, lora_alpha=5, **settings)


class Ours(nn.Module):
    """The same tree with a plain convolution where loralib keeps it."""

    def __init__(self, kernel: int, **settings: object) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.conv = nn.Conv2d(4, 6, kernel, **settings)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_conv2d_through_the_codec(kernel: int) -> None:
    """loralib's (r·k, in·k) and (out·k, r·k), seen in the weight's shape, as an ordinary low-rank change of rank r·k²."""
    torch.manual_seed(0)
    theirs, ours = randomised(Theirs(kernel, stride=2, padding=1)), Ours(kernel, stride=2, padding=1)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    file = Container({name: to_ref(tensor) for name, tensor in loralib.lora_state_dict(theirs).items()})
    attach(ours, decode(file, ReadOptions(alpha=5, kernels=(("body", kernel),))))
    assert ours.body.conv.rank == 2 * kernel**2
    x = torch.randn(3, 4, 9, 9)
    torch.testing.assert_close(ours.body.conv(x), theirs.body(x), **TOLERANCE)
    theirs.eval()
    ours.body.conv.merge()
    torch.testing.assert_close(ours.body.conv(x), theirs.body(x), **TOLERANCE)
    torch.testing.assert_close(ours.body.conv.weight, theirs.body.conv.weight, **TOLERANCE)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d"])
def test_its_conv1d_and_conv3d_raise_above_kernel_1(kind: str) -> None:
    """Its factors have k² elements for each pair of channels, these weights k and k³; ours are held in tests/layers/test_base.py."""
    made = getattr(loralib, kind, None) or getattr(loralib.layers, kind)
    theirs = made(4, 6, 3, r=2, lora_alpha=5)
    shape = (1, 4, 5) if kind == "Conv1d" else (1, 4, 5, 5, 5)
    with pytest.raises(RuntimeError, match="shape"):
        theirs(torch.randn(shape))
    assert LoRAConv1d(nn.Conv1d(4, 6, 3), rank=2, alpha=5)(torch.randn(1, 4, 5)).shape == (1, 6, 3)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_lora_state_dict_holds_what_loralibs_does(bias: str) -> None:
    theirs = nn.Sequential(loralib.Linear(4, 4, r=2), nn.Linear(4, 4), loralib.Embedding(4, 4, r=2))
    first, last = LoRALinear(nn.Linear(4, 4), rank=2, alpha=1), LoRAEmbedding(nn.Embedding(4, 4), rank=2, alpha=1)
    ours = nn.Sequential(first, nn.Linear(4, 4), last)
    assert shapes(lora_state_dict(ours, bias)) == shapes(loralib.lora_state_dict(theirs, bias))


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
