"""DoRALinear, DoRAConv2d, DoRAEmbedding: y = m/‖V‖ ∘ V·x + b, V = W + scaling·B·A (Liu et al. 2024, arXiv:2402.09353, eq. 5).

The norm is detached from the gradient, as the paper's section 4.3 has it. `axis` says what one magnitude is for: "out", a
feature of the output (peft, LyCORIS; the paper's own columns), or "in", a feature of the input (the from-scratch tutorial).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import torch
from torch import Tensor, nn

from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.errors import OptionError
from loratools.layers import _fused
from loratools.layers._conv import LoRAConv2d
from loratools.layers._embedding import LoRAEmbedding
from loratools.layers._linear import LoRALinear
from loratools.layers._norms import row_norms
from loratools.layers.base import LoRALayer, Options
from loratools.tensors import to_ref


class DoRALayer(LoRALayer):
    """A low-rank layer with a `magnitude`, one for each feature of the `axis`, which starts at the norms of W."""

    magnitude: nn.Parameter
    axis: str

    def add_magnitude(self, axis: str) -> None:
        """Make the magnitude, in float32 or wider, so that nothing changes before training."""
        if axis not in ("out", "in"):
            raise OptionError("axis of the magnitude", found=axis, expected="out or in")
        self.axis = axis
        with torch.no_grad():
            self.magnitude = nn.Parameter(self.norms())

    def norms(self) -> Tensor:
        """‖V‖ for each feature of the axis, without a gradient."""
        raise NotImplementedError

    def stored_magnitude(self) -> Tensor:
        """The magnitude as it broadcasts over the stored weight; its norm runs over the axes of size 1."""
        by_rows = self.axis == ("in" if self.kind in ("transposed", "embedding") else "out")
        return self.magnitude.view(-1, *(1,) * (self.weight.dim() - 1)) if by_rows else self.magnitude.view(1, -1)

    def gain(self) -> Tensor:
        """magnitude / ‖V‖, 1-D; the gradient goes through the magnitude alone."""
        norms = self.norms()
        return self.magnitude.to(norms.dtype) / torch.where(norms > 0, norms, 1)  # a zero row of V stays zero

    def delta(self) -> Delta:
        return DoRA(direction=self.low_rank(), magnitude=to_ref(self.stored_magnitude().clone()))

    def merged_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        magnitude = self.stored_magnitude().detach().flatten(1)
        if len(magnitude) > 1 or len(self.weight) == 1:
            norms = torch.cat([torch.linalg.vector_norm(block, dim=1, keepdim=True) for _, block in self.direction_blocks()])
        else:
            squares = [block.square().sum(0, keepdim=True) for _, block in self.direction_blocks()]
            norms = torch.stack(squares).sum(0).sqrt_()
        gain = magnitude.to(norms.dtype) / torch.where(norms > 0, norms, 1)
        for part, block in self.direction_blocks():
            yield part, block.mul_(gain[part] if len(gain) > 1 else gain)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}"


def scaled(z: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """gain∘z + bias over the last axis, in z's dtype.

    On a CUDA device it is made in float32 and rounded once. Elsewhere in 16 bits it is z + (gain − 1)∘z: a gain near 1 would lose its
    digits in the rounding, gain − 1 keeps them.
    """
    plain = gain.dim() == 1 and (bias is None or not bias.requires_grad)
    if plain and _fused.usable(z, gain, *(() if bias is None else (bias,))):
        return _fused.gained(z, gain, bias)
    if z.dtype in (torch.bfloat16, torch.float16):
        y = torch.addcmul(z, z, (gain - 1).to(z.dtype))
        return y if bias is None else y.add_(bias)
    gain = gain.to(z.dtype)
    return z * gain if bias is None else torch.addcmul(bias.to(z.dtype), z, gain)


class DoRALinear(DoRALayer, LoRALinear):
    """In the place of an `nn.Linear` or transformers' `Conv1D`; magnitude (out,) or, with axis "in", (in,).

    >>> DoRALinear(nn.Linear(8, 4), rank=2, alpha=4, axis="in").magnitude.shape
    torch.Size([8])
    """

    def __init__(self, base: nn.Module, *, axis: str = "out", fan_in_fan_out: bool | None = None, **settings: Unpack[Options]) -> None:
        LoRALinear.__init__(self, base, fan_in_fan_out=fan_in_fan_out, **settings)
        self.add_magnitude(axis)

    def norms(self) -> Tensor:
        if self.axis == "out":
            return row_norms(self.matrix(), self.lora_A, self.lora_B, self.scaling)
        return row_norms(self.matrix().T, self.lora_B.T, self.lora_A.T, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return LoRALinear.forward(self, x)
        if self.axis == "in":
            return LoRALinear.forward(self, scaled(x, self.gain()))
        gain = self.gain()  # first: it asks the device a question, which would else wait for the product below
        base = nn.functional.linear(x, self.matrix())
        return scaled(self.add_change(base, x), gain, self.bias)


class DoRAConv2d(DoRALayer, LoRAConv2d):
    """In the place of an `nn.Conv2d`; magnitude (out,), one for each output channel.

    >>> DoRAConv2d(nn.Conv2d(3, 8, 3), rank=2, alpha=4)(torch.zeros(1, 3, 5, 5)).shape
    torch.Size([1, 8, 3, 3])
    """

    def __init__(self, base: nn.Module, **settings: Unpack[Options]) -> None:
        LoRAConv2d.__init__(self, base, **settings)
        self.add_magnitude("out")

    def norms(self) -> Tensor:
        return row_norms(self.weight.flatten(1), self.lora_A.flatten(1), self.lora_B, self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return LoRAConv2d.forward(self, x)
        V = self.add_change(self.convolve(x, self.weight, None), x)
        return scaled(V.movedim(-3, -1), self.gain(), self.bias).movedim(-1, -3)


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """In the place of an `nn.Embedding`; magnitude (embedding_dim,) as in peft or, with axis "in", (num_embeddings,).

    >>> DoRAEmbedding(nn.Embedding(10, 4), rank=2, alpha=4).magnitude.shape
    torch.Size([4])
    """

    def __init__(self, base: nn.Module, *, axis: str = "out", **settings: Unpack[Options]) -> None:
        LoRAEmbedding.__init__(self, base, **settings)
        self.add_magnitude(axis)

    def norms(self) -> Tensor:
        if self.axis == "out":
            return row_norms(self.weight.T, self.lora_A, self.lora_B, self.scaling)
        return row_norms(self.weight, self.lora_B.T, self.lora_A.T, self.scaling)

    def forward(self, indices: Tensor) -> Tensor:
        base = nn.Embedding.forward(self, indices)
        if self.merged:
            return base
        V = self.add_change(base, indices)
        if self.axis == "out":
            return scaled(V, self.gain())
        wide = torch.promote_types(V.dtype, torch.float32)
        norms = torch.linalg.vector_norm(V.detach(), dim=-1, dtype=wide)  # of the rows looked up alone
        gain = self.magnitude[indices].to(norms.dtype) / torch.where(norms > 0, norms, 1)
        return scaled(V, gain.unsqueeze(-1))
