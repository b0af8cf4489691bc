"""One layer of each kind, with a change in it, and an input for it: what the laws of all layers are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loratools import layers
from loratools.layers import LoRALayer

Make = Callable[..., LoRALayer]
INDICES = "indices"

PLAIN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 6),
    "unbiased": lambda: nn.Linear(12, 6, bias=False),
    "Conv1D": lambda: Conv1D(6, 12),
    "embedding": lambda: nn.Embedding(20, 6, padding_idx=3),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(4, 6, 2, dilation=2, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
}
INPUTS = {
    "linear": (5, 12), "unbiased": (2, 3, 12), "Conv1D": (2, 3, 12), "embedding": (4, 7), "conv1d": (2, 4, 9), "conv2d": (2, 4, 6, 5),
    "conv3d": (2, 4, 5, 5, 5), "grouped": (2, 4, 6, 6), "merged": (3, 5, 12), "merged, stored (in, out)": (5, 12),
    "stored (in, out)": (5, 12),
}  # fmt: skip
LORA: dict[str, Make] = {
    "linear": layers.LoRALinear,
    "unbiased": layers.LoRALinear,
    "Conv1D": layers.LoRALinear,
    "embedding": layers.LoRAEmbedding,
    "conv1d": layers.LoRAConv1d,
    "conv2d": layers.LoRAConv2d,
    "conv3d": layers.LoRAConv3d,
    "grouped": layers.LoRAConv2d,
    "merged": lambda base, **more: layers.LoRAMergedLinear(base, enable_lora=[True, False, True], **more),
    "merged, stored (in, out)": lambda base, **more: layers.LoRAMergedLinear(base, enable_lora=[False, True], fan_in_fan_out=True, **more),
    "stored (in, out)": lambda base, **more: layers.LoRALinear(base, fan_in_fan_out=True, **more),
}
DORA: dict[str, Make] = {
    "linear": layers.DoRALinear,
    "linear, in": lambda base, **more: layers.DoRALinear(base, axis="in", **more),
    "unbiased": layers.DoRALinear,
    "Conv1D": layers.DoRALinear,
    "Conv1D, in": lambda base, **more: layers.DoRALinear(base, axis="in", **more),
    "embedding": layers.DoRAEmbedding,
    "embedding, in": lambda base, **more: layers.DoRAEmbedding(base, axis="in", **more),
    "conv2d": layers.DoRAConv2d,
    "grouped": layers.DoRAConv2d,
}
KINDS = [("lora", name) for name in LORA] + [("dora", name) for name in DORA]


def plain(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module whose place a case's layer takes."""
    made = PLAIN.get(name.removesuffix(", in"), PLAIN["linear"])()
    if isinstance(made, Conv1D):
        nn.init.normal_(made.bias)
    return made.to(device=device, dtype=dtype)


def layer(
    method: str,
    name: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    base: nn.Module | None = None,
    factors: torch.dtype | None = None,
    **more: Any,
) -> LoRALayer:
    """A case's layer over a module, a fresh one by default, its change still zero."""
    made = {"lora": LORA, "dora": DORA}[method][name]
    return made(plain(name, device, dtype) if base is None else base, **({"rank": 2, "alpha": 3, "dtype": factors} | more))


def changed(made: LoRALayer, size: float = 0.3) -> LoRALayer:
    """The layer with random factors and, if it has one, a random magnitude."""
    with torch.no_grad():
        made.lora_A.normal_(std=size)
        made.lora_B.normal_(std=size)
        if hasattr(made, "magnitude"):
            made.magnitude.mul_(1 + 0.3 * torch.rand_like(made.magnitude))
    return made


def inputs(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """A random input of a case's shape."""
    shape = INPUTS[name.removesuffix(", in")]
    if name.startswith("embedding"):
        return torch.randint(0, 20, shape, device=device)
    return torch.randn(shape, device=device, dtype=dtype)


def dense_change(made: LoRALayer) -> Tensor:
    """scaling·B·A in the shape of the stored weight, in float64, from each kind's definition."""
    A, B = made.lora_A.detach().double(), made.lora_B.detach().double()
    if isinstance(made, layers.LoRAMergedLinear):
        o, r = made.out_features // len(made.enable_lora), made.rank
        change = A.new_zeros(made.out_features, made.in_features)
        for j, slot in enumerate([index for index, flag in enumerate(made.enable_lora) if flag]):
            change[slot * o : (slot + 1) * o] = B[j * o : (j + 1) * o] @ A[j * r : (j + 1) * r]
    else:
        change = (B @ A.flatten(1)).view(len(B), *A.shape[1:])
    turned = isinstance(made, layers.LoRAEmbedding) or getattr(made, "fan_in_fan_out", False)
    return made.scaling * (change.T if turned else change)


def dense(made: LoRALayer) -> Tensor:
    """W′ in float64, DoRA's with the norm taken from V itself."""
    V = made.weight.detach().double() + dense_change(made)
    if not hasattr(made, "magnitude"):
        return V
    turned = isinstance(made, layers.LoRAEmbedding) or getattr(made, "fan_in_fan_out", False)
    by_rows = (made.axis == "out") != turned
    axes = tuple(range(1, V.dim())) if by_rows else (0,)
    magnitude = made.magnitude.detach().double()
    shaped = magnitude.view(-1, *(1,) * (V.dim() - 1)) if by_rows else magnitude.view(1, -1)
    return V / torch.linalg.vector_norm(V, dim=axes, keepdim=True) * shaped


def plain_output(made: LoRALayer, name: str, weight: Tensor, x: Tensor) -> Tensor:
    """What the plain module of a case gives in float64 with another weight."""
    module = plain(name, str(weight.device), torch.float64)
    if getattr(made, "fan_in_fan_out", False) and isinstance(module, nn.Linear):
        weight = weight.T
    bias = getattr(made, "bias", None)
    module.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias.detach().double()}))
    return module(x.double() if x.is_floating_point() else x)
