"""Ranks and factors for a resize: one policy's choice for a module, or one budget of bytes over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools.compress import error_of, hollow, known_of, lossless_rank, padded, recast, style_of, truncated, widest, within
from loratools.deltas.base import Delta
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import OptionError, UsageError
from loratools.factors import Factored
from loratools.formats.base import Container
from loratools.ops._algebra import bias_of
from loratools.ops._size import file_bytes, parse_size
from loratools.refs import BITS
from loratools.tensors import dtype_code

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.product import Triple

Encode = Callable[[Mapping[str, LowRank]], Container]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The options, checked: a rank, or the relative error to stay within, or the size of the file; and the dtype of the factors."""

    rank: int | None
    limit: float | None
    size: int | None
    code: str | None

    @classmethod
    def checked(
        cls, *, rank: int | None, energy: float | None, max_error: float | None, size: str | int | None, dtype: str | None
    ) -> Policy:
        given = {"--rank": rank, "--energy": energy, "--max-error": max_error, "--size": size}
        chosen = [name for name, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise UsageError("one way to choose ranks is needed", found=" and ".join(chosen) or "none", expected=" or ".join(given))
        if rank is not None and (type(rank) is not int or rank < 1):
            raise UsageError("--rank", found=rank, expected="a whole number of at least 1")
        if energy is not None and not 0 < energy <= 1:
            raise UsageError("--energy", found=energy, expected="more than 0, at most 1")
        if max_error is not None and not 0 < max_error < 1:
            raise UsageError("--max-error", found=max_error, expected="between 0 and 1")
        limit = math.sqrt(1 - energy) if energy is not None else max_error
        return cls(rank=rank, limit=limit, size=None if size is None else parse_size(size), code=dtype_code(dtype) if dtype else None)

    def of(self, low: LowRank) -> str:
        """The dtype that a LoRA's factors are written in."""
        return self.code or widest([low])


def resized(low: LowRank, rank: int, code: str | None) -> Factored:
    """A LoRA at a rank: the best there is below its own, its own factors at or above it, zeros added."""
    if rank >= low.rank:
        return kept(low, rank, code)
    return truncated(known_of([(low, 1.0)])[0], rank, style_of(low, code))


def kept(low: LowRank, rank: int, code: str | None) -> Factored:
    """A LoRA's own factors, in another dtype if one is asked for, at a rank that is not below its own."""
    same = code is None or {low.A.spec.dtype, low.B.spec.dtype} == {code}
    if same:
        return Factored(delta=padded(low, rank), norm=low.norm(), error=0.0, optimal=0.0, method="kept")
    assert code is not None
    cast = replace(low, A=recast(low.A, code), B=recast(low.B, code))
    known, _ = known_of([(low, 1.0)])
    return Factored(delta=padded(cast, rank), norm=_norm(known), error=error_of(known, cast), optimal=0.0, method="kept")


def reached(low: LowRank, limit: float, code: str | None) -> Factored:
    """The least rank whose error as stored is within limit · ‖ΔW‖; the LoRA's own factors where no lower rank is."""
    known, noise = known_of([(low, 1.0)])
    return within(known, noise, limit, style_of(low, code), low.rank) or kept(low, low.rank, code)


def squares(low: LowRank) -> list[float]:
    """σ² of ΔW, falling, those left out that are rounding."""
    known, noise = known_of([(low, 1.0)])
    rank = lossless_rank(known, noise, "F64")
    return [float(value) ** 2 for value in known.S[:rank]]


def ranks_within(
    size: int, lows: Mapping[str, LowRank], sigma2: Mapping[str, Sequence[float]], policy: Policy, encode: Encode
) -> dict[str, int]:
    """The ranks with the least total error whose file is at most `size` bytes; every module keeps at least rank 1.

    Each rank is charged its rows and columns. What the header adds shows in the size of the whole plan, and what that is too
    large by is taken off the budget until it fits. Raises OptionError with the least size where rank 1 for all is too large.
    """
    from loratools.linalg.ranks import Module, budget

    def file(ranks: Mapping[str, int]) -> int:
        return file_bytes(encode({name: hollow(low, ranks[name], policy.of(low)) for name, low in lows.items()}))

    ones = dict.fromkeys(lows, 1)
    least = file(ones)
    if least > size:
        raise OptionError("--size is too small for rank 1 in every module", found=f"{size} bytes", expected=f"at least {least} bytes")
    modules = [
        Module(
            sigma2=sigma2[name][1 : low.rank],
            bytes_per_rank=(low.B.spec.shape[0] + low.A.spec.numel // low.rank) * BITS[policy.of(low)] // 8,
        )
        for name, low in lows.items()
    ]
    capacity = size - least
    while capacity > 0:
        ranks = {name: 1 + extra for name, extra in zip(lows, budget(modules, capacity), strict=True)}
        excess = file(ranks) - size
        if excess <= 0:
            return ranks
        capacity -= excess
    return ones


def following(source: Mapping[str, Delta], deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """The deltas with every bias difference under the scaling of its module, its data as it is: for measuring a file."""
    lows = {name: bias_of(name, deltas) for name, delta in source.items() if isinstance(delta, Full)}
    return {
        name: replace(delta, scale=low.scaling) if isinstance(delta, Full) and (low := lows[name]) else delta
        for name, delta in deltas.items()
    }


def _norm(known: Triple) -> float:
    import torch

    found: Tensor = torch.linalg.vector_norm(known.S)
    return float(found)
