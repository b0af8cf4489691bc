"""How a rank is chosen from singular values: a number, a share of the energy, or a largest error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.errors import OptionError


@dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps this fraction of ‖D‖², at least 1.

    >>> Energy(0.9).rank(torch.tensor([3.0, 1.0, 0.5]), total=10.25)
    2
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise OptionError("energy", found=self.fraction, expected="more than 0, at most 1")

    def rank(self, sigma: Tensor, total: float) -> int:
        """The rank, for singular values in falling order and total = ‖D‖²; all of them where they do not reach the fraction."""
        reached = torch.cumsum(sigma.double().square(), 0) >= self.fraction * total
        return _first(reached)

    def reached(self, sigma: Tensor, total: float) -> bool:
        """Whether these leading singular values suffice."""
        return bool(sigma.double().square().sum() >= self.fraction * total)


@dataclass(frozen=True)
class MaxError:
    """The smallest rank with ‖D − D_r‖ ≤ fraction · ‖D‖, at least 1.

    >>> MaxError(0.2).rank(torch.tensor([3.0, 1.0, 0.5]), total=10.25)
    2
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise OptionError("largest error", found=self.fraction, expected="between 0 and 1")

    def rank(self, sigma: Tensor, total: float) -> int:
        """The rank, for singular values in falling order and total = ‖D‖²; all of them where they do not reach the error."""
        tail = total - torch.cumsum(sigma.double().square(), 0)
        return _first(tail <= self.fraction**2 * total)

    def reached(self, sigma: Tensor, total: float) -> bool:
        """Whether these leading singular values suffice."""
        return bool(total - sigma.double().square().sum() <= self.fraction**2 * total)


@dataclass(frozen=True)
class Fixed:
    """This rank, or as many singular values as there are.

    >>> Fixed(8).rank(torch.ones(5), total=5.0)
    5
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise OptionError("rank", found=self.size, expected="1 or more")

    def rank(self, sigma: Tensor, total: float) -> int:
        """The rank."""
        return min(self.size, sigma.numel())

    def reached(self, sigma: Tensor, total: float) -> bool:
        """Whether these leading singular values suffice."""
        return sigma.numel() >= self.size


@dataclass(frozen=True)
class Capped:
    """Another rule's rank, but no more than this.

    >>> Capped(Energy(0.99), 2).rank(torch.ones(5), total=5.0)
    2
    """

    inner: Energy | MaxError
    cap: int

    def rank(self, sigma: Tensor, total: float) -> int:
        """The rank."""
        return min(self.cap, self.inner.rank(sigma, total))

    def reached(self, sigma: Tensor, total: float) -> bool:
        """Whether these leading singular values suffice."""
        return sigma.numel() >= self.cap or self.inner.reached(sigma, total)


Rule = Fixed | Energy | MaxError | Capped
RankRule = int | Fixed | Energy | MaxError


def as_rule(rank: RankRule, limit: int) -> Fixed | Capped:
    """The rule with no rank above `limit`; an int is `Fixed`."""
    if isinstance(rank, int):
        rank = Fixed(rank)
    if limit < 1:
        raise OptionError("largest rank", found=limit, expected="1 or more")
    return Fixed(min(rank.size, limit)) if isinstance(rank, Fixed) else Capped(rank, limit)


def _first(reached: Tensor) -> int:
    """One more than the first true position, or the length if there is none."""
    return int(reached.to(torch.int8).argmax()) + 1 if bool(reached.any()) else max(1, reached.numel())
