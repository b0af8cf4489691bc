"""A network with one layer of every kind that peft's LoRA adapts, each with an input of its own.

A change of one layer then shows in its own output alone, and a layer's output is linear in its weight: strengths and several
adapters can be checked on outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.files import read_checkpoint, write_checkpoint

TARGETS = ["linear", "square", "gpt", "gpt_square", "conv1", "conv2", "point2", "conv3", "point3", "long3", "table"]
TRANSPOSED = ("*gpt_square",)  # nothing in a file tells this one


class Zoo(nn.Module):
    """Layers of every kind; `forward` maps inputs by layer to outputs by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 40)
        self.square = nn.Linear(20, 20)
        self.gpt = Conv1D(36, 20)
        self.gpt_square = Conv1D(20, 20)
        self.conv1 = nn.Conv1d(6, 10, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(6, 10, (3, 5), stride=(1, 2), padding=(2, 1))
        self.point2 = nn.Conv2d(6, 10, 1, stride=2)
        self.conv3 = nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 2))
        self.point3 = nn.Conv3d(4, 6, 1)
        self.long3 = nn.Conv3d(4, 6, (1, 1, 3))
        self.table = nn.Embedding(50, 12, padding_idx=3)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.even2 = nn.Conv2d(6, 10, 3, stride=2, padding=1)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: getattr(self, name)(x) for name, x in inputs.items()}


def inputs(seed: int) -> dict[str, Tensor]:
    """Fresh inputs for every layer, in float64."""
    shapes = {
        "linear": (3, 24), "square": (3, 20), "gpt": (3, 20), "gpt_square": (3, 20), "conv1": (2, 6, 9), "conv2": (2, 6, 7, 8),
        "point2": (2, 6, 5, 4), "conv3": (1, 4, 4, 5, 3), "point3": (1, 4, 3, 2, 3), "long3": (1, 4, 2, 2, 5),
        "norm": (3, 8), "head": (3, 8), "even2": (2, 6, 7, 8),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return found | {"table": torch.arange(50).reshape(5, 10)}


def new_base(folder: Path, dtype: torch.dtype, seed: int = 0) -> Zoo:
    """A random network of that dtype, its weights written to a folder."""
    torch.manual_seed(seed)
    zoo = Zoo().to(dtype)
    with torch.no_grad():
        for parameter in zoo.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.5)
    write_checkpoint(folder, zoo.state_dict())
    return zoo.eval()


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Everything that training would have changed takes random values: factors, magnitudes, biases, saved modules."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(0.3 * noise)
            elif parameter.requires_grad:
                parameter.add_(noise)


def wrap(model: nn.Module, folder: Path, seed: int = 1, **config: Any) -> PeftModel:
    """The model under a randomised adapter, which is also saved to the folder by peft."""
    wrapped = get_peft_model(model, LoraConfig(**config))
    randomize(wrapped, seed)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
def outputs(model: nn.Module, seed: int = 7) -> dict[str, Tensor]:
    """The model's outputs in float64: its weights are widened, which is exact."""
    return dict(model.double()(inputs(seed)))


def merged_outputs(folder: Path, seed: int = 7) -> dict[str, Tensor]:
    """The outputs of the network that a folder holds."""
    zoo = Zoo().double().eval()
    zoo.load_state_dict(read_checkpoint(folder))
    return outputs(zoo, seed)


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """‖found − expected‖ / ‖expected‖ of each output."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
