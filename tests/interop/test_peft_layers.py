"""peft 0.21.2, live: a model trained through our layers gives the same outputs in peft, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loratools
from loratools.layers import LoRALayer, adapter_from, attach, inject
from tests.layers.cases import changed


class Net(nn.Module):
    """Every kind of layer both sides know, one after another."""

    def __init__(self, conv: bool = True) -> None:
        super().__init__()
        self.embed, self.q_proj, self.v_proj, self.c_fc = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False), Conv1D(12, 6)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(1, 3, 3, padding=1), nn.Conv2d(1, 4, (2, 3)), nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.c_fc(self.v_proj(self.q_proj(self.embed(indices)))).unsqueeze(1)  # (n, 1, 12)
        x = self.conv2(self.conv1(x).unsqueeze(1))  # (n, 4, 2, 10)
        return self.head(self.conv3(x.unsqueeze(1)).flatten(2).mean(2))


TARGETS = ["embed", "q_proj", "v_proj", "c_fc", "conv1", "conv2", "conv3"]
DORA_TARGETS = ["embed", "q_proj", "v_proj", "c_fc", "conv2"]  # the kinds for which we have DoRA layers
INDICES = torch.arange(11)
# float32 through seven layers, and peft adds the change of a DoRA in another order
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_ours_in_peft(rslora: bool, dora: bool, tmp_path: Path) -> None:
    model = net()
    before = model(INDICES)
    inject(model, DORA_TARGETS if dora else TARGETS, rank=2, alpha=3, rslora=rslora, dora=dora)
    torch.testing.assert_close(model(INDICES), before, **TOLERANCE)
    for module in model.modules():
        if isinstance(module, LoRALayer):
            changed(module)
    loratools.save(adapter_from(model), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").eval()
    assert not torch.allclose(model(INDICES), before, atol=1e-3)
    torch.testing.assert_close(theirs(INDICES), model(INDICES), **TOLERANCE)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_pefts_in_ours(rslora: bool, dora: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    targets = DORA_TARGETS if dora else TARGETS
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_rslora=rslora, use_dora=dora, init_lora_weights=False)
    theirs: Any = peft.get_peft_model(net(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = net()
    attach(ours, loratools.load(tmp_path / "adapter"))
    torch.testing.assert_close(ours(INDICES), theirs(INDICES), **TOLERANCE)
    for module in ours.modules():
        if isinstance(module, LoRALayer):
            module.merge()
    torch.testing.assert_close(ours(INDICES), theirs(INDICES), **TOLERANCE)


def test_a_step_of_training_moves_both_alike() -> None:
    """Gradients of LoRA and DoRA agree with peft's, so the same optimiser takes the same step."""
    for dora in (False, True):
        ours, theirs = net(), net()
        names = ["q_proj", "v_proj", "conv2"]
        inject(ours, names, rank=2, alpha=3, dora=dora)
        wrapped: Any = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=3, target_modules=names, use_dora=dora)).eval()
        for name in names:
            mine, other = getattr(ours, name), getattr(wrapped.base_model.model, name)
            changed(mine)
            with torch.no_grad():
                other.lora_A["default"].weight.copy_(mine.lora_A)
                other.lora_B["default"].weight.copy_(mine.lora_B.view_as(other.lora_B["default"].weight))
                if dora:
                    magnitude = other.lora_magnitude_vector["default"].weight
                    magnitude.copy_(mine.magnitude.view_as(magnitude))
        ours(INDICES).square().sum().backward()
        wrapped(INDICES).square().sum().backward()
        for name in names:
            mine, other = getattr(ours, name), getattr(wrapped.base_model.model, name)
            for factor in ("lora_A", "lora_B"):
                expected = getattr(other, factor)["default"].weight.grad
                torch.testing.assert_close(getattr(mine, factor).grad.view_as(expected), expected, rtol=1e-4, atol=1e-4)
            if dora:
                expected = other.lora_magnitude_vector["default"].weight.grad
                torch.testing.assert_close(mine.magnitude.grad.view_as(expected), expected, rtol=1e-4, atol=1e-4)
