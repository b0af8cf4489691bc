"""float64 rounded once to a narrower dtype, to nearest with ties to even.

torch takes float64 to bfloat16 and float16 by way of float32, which rounds twice: where the first rounding lands on a tie of
the second, the second decides without knowing on which side the value was (one in 65 thousand for bfloat16, one in 8 thousand
for float16). Rounding the first to odd repairs that: Boldo, Melquiond, "Emulation of FMA and correctly rounded sums: proved
algorithms using rounding to odd", IEEE Transactions on Computers 57, 2008. Only values near a tie need it, and those are few.

bfloat16 has float32's exponents, so there three float64 operations of Veltkamp's round to its 8 bits at once (Boldo, "Pitfalls
of a full floating-point proof", IJCAR 2006); numbers below its smallest normal one, 2**-126, have fewer bits and are rounded twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_VELTKAMP = 2.0**45 + 1  # leaves 53 − 45 = 8 bits
_LOWEST = np.int32(-(2**31))
# bits of a float32 that a dtype lacks; below the smallest normal number it lacks more
_LACKS = {"float16": (13, 2.0**-14)}


class Rounding:
    """Writes float64 blocks into blocks of one dtype; buffers are used again, so one object belongs to one thread.

    >>> import torch
    >>> out = torch.empty(1, dtype=torch.bfloat16)
    >>> Rounding()(torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64), out)  # just above the tie of 1 and 1 + 2**-7
    >>> out.item(), torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64).bfloat16().item()
    (1.0078125, 1.0)
    """

    def __init__(self) -> None:
        self._narrow = np.empty(0, np.float32)
        self._low = np.empty(0, np.int32)
        self._split: list[Tensor] = []

    def __call__(self, wide: Tensor, out: Tensor) -> None:
        """out = wide, rounded; shapes are equal, `wide` on any device."""
        import torch

        if out.dtype in (torch.float64, torch.float32) or not out.dtype.is_floating_point or wide.dtype != torch.float64:
            out.copy_(wide)
        elif out.dtype == torch.bfloat16:
            out.copy_(self._eight_bits(wide))
        elif wide.device.type != "cpu":
            out.copy_(_to_odd(wide))
        else:
            self._round(wide.reshape(-1), out)

    def _eight_bits(self, wide: Tensor) -> Tensor:
        import torch

        if not self._split or self._split[0].shape != wide.shape or self._split[0].device != wide.device:
            self._split = [torch.empty_like(wide), torch.empty_like(wide)]
        large, low = self._split
        torch.mul(wide, _VELTKAMP, out=large)
        torch.sub(large, wide, out=low)
        return torch.sub(large, low, out=low)

    def _round(self, wide: Tensor, out: Tensor) -> None:
        import torch

        size = wide.numel()
        if len(self._narrow) < size:
            self._narrow, self._low = np.empty(size, np.float32), np.empty(size, np.int32)
        narrow, low = self._narrow[:size], self._low[:size]
        as_tensor = torch.from_numpy(narrow)
        as_tensor.copy_(wide)
        suspects = self._suspects(narrow, low, str(out.dtype).removeprefix("torch."))
        if suspects.size:
            _fix(wide.numpy(), narrow, suspects)
        out.copy_(as_tensor.view(out.shape))

    def _suspects(self, narrow: np.ndarray, low: np.ndarray, dtype: str) -> np.ndarray:
        """Where the second rounding could meet a tie: the bits it drops are 100…, or there are more than these."""
        if dtype not in _LACKS:
            return np.arange(narrow.size)
        bits, smallest = _LACKS[dtype]
        np.left_shift(narrow.view(np.int32), 32 - bits, out=low)
        found = low == _LOWEST
        if smallest:
            found |= np.abs(narrow) < smallest
        return np.flatnonzero(found)


def _fix(wide: np.ndarray, narrow: np.ndarray, at: np.ndarray) -> None:
    """Round to odd instead: of the two float32 around a value that is none, the one whose last bit is set."""
    values, nearest = wide[at], narrow[at]
    back, bits = nearest.astype(np.float64), nearest.view(np.int32)
    step = np.where(np.abs(values) > np.abs(back), 1, -1).astype(np.int32)
    narrow[at] = np.where((back != values) & (bits & 1 == 0), bits + step, bits).view(np.float32)


def _to_odd(wide: Tensor) -> Tensor:
    """The same on any device, for all values."""
    import torch

    nearest = wide.to(torch.float32)
    back, bits = nearest.to(torch.float64), nearest.view(torch.int32)
    step = torch.where(wide.abs() > back.abs(), 1, -1).to(torch.int32)
    return torch.where((back != wide) & (bits & 1 == 0), bits + step, bits).view(torch.float32)
