"""LoRALinear: y = x·Wᵀ + b + scaling·(x·Aᵀ)·Bᵀ; the paper's layer for dense weights, stored either way round."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn
from torch.nn.functional import linear

from loratools.errors import UnsupportedError
from loratools.layers.base import LoRALayer, Options, Settings, add_up, check_plain, down


class LoRALinear(LoRALayer, nn.Linear):
    """In the place of an `nn.Linear` or of transformers' `Conv1D`, which stores its weight (in, out).

    lora_A (rank, in), lora_B (out, rank) whichever way the weight is stored. `fan_in_fan_out` stores an `nn.Linear`'s weight
    as (in, out), as loralib does; the output stays the same. Raises UnsupportedError for a layer with a forward of its own.

    >>> import torch
    >>> layer = LoRALinear(nn.Linear(8, 4), rank=2, alpha=4)
    >>> layer(torch.zeros(3, 8)).shape, layer.lora_A.shape, layer.lora_B.shape
    (torch.Size([3, 4]), torch.Size([2, 8]), torch.Size([4, 2]))
    """

    def __init__(self, base: nn.Module, *, fan_in_fan_out: bool | None = None, **settings: Unpack[Options]) -> None:
        weight, transposed = dense_weight(base, fan_in_fan_out)
        sizes = weight.shape if transposed else weight.shape[::-1]
        nn.Linear.__init__(self, sizes[0], sizes[1], getattr(base, "bias", None) is not None, "meta")
        self.fan_in_fan_out = transposed
        self.start(base, weight, Settings(**settings))

    def start(self, base: nn.Module, weight: Tensor, settings: Settings) -> None:
        """Make the factors, of shapes that subclasses may choose."""
        self.adapt(base, weight, settings, (settings.rank, self.in_features), (self.out_features, settings.rank))

    def matrix(self) -> Tensor:
        """The weight as (out, in)."""
        weight: Tensor = self.weight
        return weight.T if self.fan_in_fan_out else weight

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        return (self.lora_A.T, self.lora_B.T) if self.fan_in_fan_out else (self.lora_B, self.lora_A)

    @property
    def kind(self) -> str:
        return "transposed" if self.fan_in_fan_out else "linear"

    def forward(self, x: Tensor) -> Tensor:
        base = linear(x, self.matrix(), self.bias)
        return base if self.merged else self.add_change(base, x)

    def add_change(self, base: Tensor, x: Tensor) -> Tensor:
        """base + scaling·B(A(x)); `base` may be overwritten."""
        return add_up(base, down(self.lora_dropout(x), self.lora_A), self.lora_B, self.scaling)


def dense_weight(base: nn.Module, fan_in_fan_out: bool | None) -> tuple[Tensor, bool]:
    """The weight to keep, and whether it is stored (in, out)."""
    if is_conv1d(base):
        if fan_in_fan_out is False:
            raise UnsupportedError("a Conv1D stores its weight (in, out)", remedy="leave fan_in_fan_out out")
        check_plain(base, (type(base),))
        assert isinstance(base.weight, Tensor)
        return base.weight, True
    check_plain(base, (nn.Linear,))
    assert isinstance(base, nn.Linear)
    if not fan_in_fan_out:
        return base.weight, False
    return nn.Parameter(base.weight.detach().T.contiguous()), True


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `pytorch_utils.Conv1D`, told without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
