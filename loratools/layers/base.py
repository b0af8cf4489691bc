"""What every layer with a low-rank change shares: its settings, its factors, merging, and what it tells an `Adapter`.

A layer takes the place of the plain one and keeps its parameters under their names, so a base's checkpoint still loads and
the names in an adapter are those of the base. The arithmetic here is written from the paper and shares nothing with
`loratools.deltas`, so that each can check the other (Hu et al. 2021, arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Required, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loratools.deltas.base import Delta
from loratools.deltas.lowrank import LowRank
from loratools.errors import OptionError, UnsupportedError
from loratools.rounding import Rounding
from loratools.tensors import to_ref

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK = 1 << 22  # elements of a weight widened at once while merging: 32 MB in float64


class Options(TypedDict, total=False):
    """The keyword arguments every layer takes; see `Settings`."""

    rank: Required[int]
    alpha: Required[float]
    dropout: float
    rslora: bool
    merge_on_eval: bool
    dtype: torch.dtype | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`scaling` = alpha / rank, or alpha / √rank for rsLoRA; `dropout` acts on the input of the low-rank branch.

    `merge_on_eval` merges at eval() and unmerges at train(), as loralib does; `dtype` is that of the factors, by default
    the weight's. Raises OptionError for values that are none.

    >>> Settings(rank=4, alpha=8).scaling
    2.0
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    merge_on_eval: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise OptionError("rank", found=self.rank, expected="a whole number of at least 1")
        if not math.isfinite(self.alpha):
            raise OptionError("alpha", found=self.alpha, expected="a number")
        if not 0 <= self.dropout < 1:
            raise OptionError("dropout", found=self.dropout, expected="at least 0 and less than 1")
        if self.dtype is not None and self.dtype not in FLOATS:
            raise OptionError("dtype of the factors", found=self.dtype, expected="float16, bfloat16, float32 or float64")

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank


class LoRALayer(nn.Module):
    """A layer whose forward is base(x) + scaling·B(A(x)); `lora_A` and `lora_B` train, `weight` and `bias` are frozen.

    Before training B is zero and the output is the base's. `merge()` puts W′ into `weight` and keeps the original, which
    `unmerge()` gives back bit for bit; a state dict always holds the original, so loading it never applies a change twice.
    """

    weight: Any  # a Parameter, which torch's own classes declare each in its way
    bias: Any
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_dropout: nn.Module
    settings: Settings
    tied_to: str | None
    original: Tensor | None

    def adapt(self, base: nn.Module, weight: Tensor, settings: Settings, *shapes: tuple[int, ...]) -> None:
        """Take over a plain layer's weight and bias, frozen, and make A and B of these shapes."""
        self.settings, self.tied_to = settings, None
        self.weight = kept = weight.requires_grad_(False)
        bias = getattr(base, "bias", None)
        if isinstance(bias, Tensor):
            self.bias = bias.requires_grad_(False)
        a, b = shapes
        made: dict[str, Any] = {"device": kept.device, "dtype": settings.dtype or kept.dtype}
        self.lora_A = nn.Parameter(torch.empty(a, **made))
        self.lora_B = nn.Parameter(torch.empty(b, **made))
        self.lora_dropout = nn.Dropout(settings.dropout) if settings.dropout else nn.Identity()
        self.register_buffer("original", None, persistent=False)
        self.reset_factors()
        self.training = base.training
        self.lora_dropout.training = base.training

    def reset_factors(self) -> None:
        """A Kaiming-uniform as loralib and peft draw it, B zero: the change is zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def kind(self) -> str:
        """What `LowRank.layer` calls it."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        return self.settings.rank

    @property
    def alpha(self) -> float:
        return self.settings.alpha

    @property
    def scaling(self) -> float:
        return self.settings.scaling

    @property
    def merged(self) -> bool:
        return self.original is not None

    # -- the change, in the orientation of the stored weight

    def stored_factors(self) -> tuple[Tensor, Tensor]:
        """(B, A) whose product, rows (first axis) × the rest, is the change of the stored weight without its scaling."""
        raise NotImplementedError

    def low_rank(self) -> LowRank:
        """The low-rank part as a value object; the tensors are copied, on the CPU, in their own dtype."""
        B, A = self.stored_factors()
        refs = {"A": to_ref(A.reshape(len(A), *self.weight.shape[1:]).clone()), "B": to_ref(B.clone())}
        return LowRank(**refs, alpha=self.alpha, rslora=self.settings.rslora, layer=self.kind)

    def delta(self) -> Delta:
        """What the layer does to its weight."""
        return self.low_rank()

    def direction_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W + scaling·B·A in blocks of rows, flattened to a matrix and computed wide."""
        weight = self.weight.detach().flatten(1)
        wide = widest(weight)
        B, A = (factor.detach().to(wide) for factor in self.stored_factors())
        step = max(1, BLOCK // max(1, weight.shape[1]))
        for start in range(0, len(weight), step):
            part = slice(start, min(start + step, len(weight)))
            yield part, weight[part].to(wide) + self.scaling * (B[part] @ A)

    def merged_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W′ in blocks of rows; kinds that are no difference override it."""
        return self.direction_blocks()

    # -- merging

    @torch.no_grad()
    def merge(self) -> None:
        """Put W′, computed in float64 and rounded once, into `weight`; the original is kept.

        Raises UnsupportedError when another module of the model shares the weight and would change with it.
        """
        if self.merged:
            return
        if self.tied_to is not None:
            raise UnsupportedError(f"merging would change {self.tied_to} too, which shares this weight", remedy="untie the two first")
        merged = torch.empty_like(self.weight.data, memory_format=torch.contiguous_format)
        rows = merged.flatten(1)
        round_once = Rounding()
        for part, block in self.merged_blocks():
            round_once(block, rows[part])
        self.original = self.weight.data
        self.weight.data = merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give back the weight as it was before `merge`, the same bits."""
        if self.original is not None:
            self.weight.data, self.original = self.original, None

    def train(self, mode: bool = True) -> Self:
        """As every module's; in training a layer is never merged, since its factors would get no gradient."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.settings.merge_on_eval:
            self.merge()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.original is not None:
            destination[prefix + "weight"] = self.original

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}" + (", rslora" if self.settings.rslora else "")


def widest(weight: Tensor) -> torch.dtype:
    """The dtype to merge in: float64 where the device has it."""
    return torch.float32 if weight.device.type == "mps" else torch.float64


def check_plain(base: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Raise UnsupportedError for a layer whose work a replacement would not do: a forward of its own, hooks, odd weights."""
    found = type(base).__name__
    kind = next((kind for kind in kinds if isinstance(base, kind)), None)
    if kind is None:
        raise UnsupportedError("no such layer is known", found=found, expected=" or ".join(kind.__name__ for kind in kinds))
    if type(base).forward is not kind.forward or "forward" in vars(base):
        raise UnsupportedError("its forward is its own, and a replacement would not do the same", found=found, expected=kind.__name__)
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        raise UnsupportedError("has hooks that a replacement would lose", found=found)
    weight = base._parameters.get("weight")
    if weight is None or weight.dtype not in FLOATS:
        raise UnsupportedError("its weight is no plain floating-point parameter", found=None if weight is None else str(weight.dtype))


def down(x: Tensor, A: Tensor) -> Tensor:
    """x·Aᵀ for x (…, in) and A (r, in), in A's dtype, or autocast's."""
    return linear(x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype), A)


def add_up(base: Tensor, hidden: Tensor, B: Tensor, scaling: float) -> Tensor:
    """base + scaling·hidden·Bᵀ for `base` (…, out), which may be overwritten, hidden (…, r), B (out, r).

    In one dtype it is one matrix product that adds. Factors wider than the base's output (float32 beside bfloat16) are
    multiplied and added in their own dtype, and the sum is rounded once.
    """
    if hidden.dtype == base.dtype:
        flat, factors = base.view(-1, base.shape[-1]), (hidden.reshape(-1, hidden.shape[-1]), B.to(hidden.dtype).T)
        device = base.device.type
        alike = not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == base.dtype
        if torch.is_grad_enabled() and (base.requires_grad or hidden.requires_grad) and alike:
            return torch.addmm(flat, *factors, alpha=scaling).view(base.shape)  # in place, backward would copy the view's base twice
        flat.addmm_(*factors, alpha=scaling)
        return base
    return torch.add(base, linear(hidden, B), alpha=scaling).to(base.dtype)
