"""LoRAConv1d, LoRAConv2d, LoRAConv3d: a convolution by A to rank channels, then a 1×…×1 convolution by B.

B·A.flatten(1), seen in the weight's shape, is the change of the weight: peft's factorisation. loralib's other one is an
exact sum of these, which its codec (`loratools.formats.loralib`) writes out.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d

from loratools.errors import UnsupportedError
from loratools.layers.base import LoRALayer, Options, Settings, check_plain


class _LoRAConv(LoRALayer, nn.modules.conv._ConvNd):
    """lora_A (rank, in / groups, *kernel) with the layer's stride, padding and dilation; lora_B (out, rank).

    With groups, each group's input meets the same A and its own rows of B, so the change of the weight is B·A as ever.
    """

    plain: type[nn.modules.conv._ConvNd]

    def __init__(self, base: nn.Module, **settings: Unpack[Options]) -> None:
        check_plain(base, (self.plain,))
        assert isinstance(base, nn.modules.conv._ConvNd)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        shape: dict[str, Any] = {name: getattr(base, name) for name in names}
        self.plain.__init__(self, **shape, bias=base.bias is not None, device="meta")
        made = Settings(**settings)
        self.adapt(base, base.weight, made, (made.rank, *base.weight.shape[1:]), (self.out_channels, made.rank))

    @property
    def kind(self) -> str:
        return "conv"

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_B, self.lora_A.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        base = self.convolve(x, self.weight, self.bias)
        return base if self.merged else self.add_change(base, x)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own convolution with another weight."""
        found: Tensor = self._conv_forward(x, weight, bias)
        return found

    def add_change(self, base: Tensor, x: Tensor) -> Tensor:
        """base + scaling·B(A(x)); `base` may be overwritten."""
        A, B = self.lora_A, self.lora_B
        x = self.lora_dropout(x)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)
        repeated = A if self.groups == 1 else A.repeat(self.groups, *(1,) * (A.dim() - 1))
        hidden = self.convolve(x, repeated, None)
        if self.groups == 1 and hidden.dtype == base.dtype and base.dim() == A.dim() and base.is_contiguous():
            up = B.to(hidden.dtype).expand(len(base), *B.shape)  # one product that adds, nothing of base's size beside it
            base.flatten(2).baddbmm_(up, hidden.flatten(2), alpha=self.scaling)
            return base
        convolve = (conv1d, conv2d, conv3d)[len(self.kernel_size) - 1]
        low: Tensor = convolve(hidden * self.scaling, B.view(*B.shape, *(1,) * len(self.kernel_size)), groups=self.groups)
        return base.add_(low) if low.dtype == base.dtype else (base + low).to(base.dtype)


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    """In the place of an `nn.Conv1d`.

    >>> LoRAConv1d(nn.Conv1d(16, 33, 3), rank=4, alpha=8)(torch.zeros(20, 16, 50)).shape
    torch.Size([20, 33, 48])
    """

    plain = nn.Conv1d


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    """In the place of an `nn.Conv2d`.

    >>> LoRAConv2d(nn.Conv2d(16, 64, 3), rank=4, alpha=8).lora_A.shape
    torch.Size([4, 16, 3, 3])
    """

    plain = nn.Conv2d


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    """In the place of an `nn.Conv3d`.

    >>> LoRAConv3d(nn.Conv3d(2, 4, 3), rank=1, alpha=1).lora_B.shape
    torch.Size([4, 1])
    """

    plain = nn.Conv3d


def conv_class(base: nn.Module) -> type[_LoRAConv]:
    """The class for a convolution; UnsupportedError for those without one (transposed, lazy)."""
    for made in (LoRAConv1d, LoRAConv2d, LoRAConv3d):
        if isinstance(base, made.plain):
            return made
    raise UnsupportedError("no LoRA for this layer", found=type(base).__name__, expected="Conv1d, Conv2d or Conv3d")
