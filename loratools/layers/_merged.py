"""LoRAMergedLinear: several projections stored as one matrix (a fused q, k, v), some of them with a LoRA of their own.

As loralib's `MergedLinear` and its `enable_lora`: slot j of the enabled ones has rows j of B and A, and adds to its own rows
of the output; the others stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from loratools.deltas.lowrank import LowRank
from loratools.errors import OptionError, ShapeError
from loratools.layers._linear import LoRALinear
from loratools.layers.base import Options, Settings, down


class LoRAMergedLinear(LoRALinear):
    """In the place of a linear layer of `len(enable_lora)` equal outputs: lora_A (rank·n, in), lora_B (out/slots·n, rank),
    n the number of slots enabled.

    >>> LoRAMergedLinear(nn.Linear(8, 12), enable_lora=[True, False, True], rank=2, alpha=2).lora_B.shape
    torch.Size([8, 2])
    """

    def __init__(
        self, base: nn.Module, *, enable_lora: Sequence[bool], fan_in_fan_out: bool | None = None, **settings: Unpack[Options]
    ) -> None:
        self.enable_lora = tuple(bool(flag) for flag in enable_lora)
        if not any(self.enable_lora):
            raise OptionError("enable_lora enables nothing", found=list(self.enable_lora), expected="at least one true")
        super().__init__(base, fan_in_fan_out=fan_in_fan_out, **settings)

    def start(self, base: nn.Module, weight: Tensor, settings: Settings) -> None:
        slots, enabled = len(self.enable_lora), sum(self.enable_lora)
        if self.out_features % slots:
            raise ShapeError("the outputs do not divide into as many slots", found=self.out_features, expected=f"a multiple of {slots}")
        size = self.out_features // slots
        self.adapt(base, weight, settings, (settings.rank * enabled, self.in_features), (size * enabled, settings.rank))

    def block_factors(self) -> tuple[Tensor, Tensor]:
        """(B, A) of the whole matrix: B (out, rank·n) holds each enabled slot's rows in its own columns."""
        slots, size, rank = len(self.enable_lora), self.out_features // len(self.enable_lora), self.rank
        B = self.lora_B.new_zeros(slots, size, sum(self.enable_lora), rank)
        for j, slot in enumerate(self.enabled()):
            B[slot, :, j] = self.lora_B.detach()[j * size : (j + 1) * size]
        return B.view(self.out_features, -1), self.lora_A

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        B, A = self.block_factors()
        return (A.T, B.T) if self.fan_in_fan_out else (B, A)

    def low_rank(self) -> LowRank:
        found = super().low_rank()
        # the blocks together have n times the rank, and the scaling must stay
        return replace(found, alpha=self.scaling * found.rank, rslora=False)

    def enabled(self) -> list[int]:
        return [slot for slot, flag in enumerate(self.enable_lora) if flag]

    def add_change(self, base: Tensor, x: Tensor) -> Tensor:
        hidden = down(self.lora_dropout(x), self.lora_A)
        n, slots, size = sum(self.enable_lora), len(self.enable_lora), self.out_features // len(self.enable_lora)
        rows = hidden.reshape(-1, n, self.rank).transpose(0, 1)
        low = torch.bmm(rows, self.lora_B.view(n, size, self.rank).transpose(1, 2).to(hidden.dtype))  # (n, rows, size)
        parts = list((base if low.dtype == base.dtype else base.to(low.dtype)).view(-1, slots, size).unbind(1))
        for j, slot in enumerate(self.enabled()):
            parts[slot] = torch.add(parts[slot], low[j], alpha=self.scaling)
        return torch.stack(parts, 1).view(base.shape).to(base.dtype)
