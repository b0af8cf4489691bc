"""One budget of bytes over a whole adapter: the file that holds its weights, header and saved tensors counted, fits it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import OptionError, UsageError
from loratools.formats.base import Container
from loratools.header import build_header, canonical
from loratools.linalg.ranks import DENSE, Module, budget
from loratools.refs import BITS, InMemory, Spec

__all__ = ["DENSE", "Budget", "Candidate", "file_bytes", "parse_size"]

PADDING = 7  # a header is padded to a multiple of 8
_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
Encode = Callable[[Mapping[str, Delta]], Container]


def parse_size(size: str | int) -> int:
    """Bytes from `40MB`, `1.5GiB`, `300 kB` or a number.

    >>> parse_size("1.5MiB")
    1572864
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    if not found or found[2] not in _UNITS or isinstance(size, bool):
        raise UsageError("--size", found=size, expected="bytes, as in 40MB, 1.5GiB or 300000")
    return int(float(found[1]) * _UNITS[found[2]])


def file_bytes(container: Container) -> int:
    """The size of the safetensors file that holds a container's tensors, its header counted. Raises OptionError for other files."""
    if container.writer is not None:
        raise OptionError("--size is counted for safetensors alone", remedy="choose ranks by --rank, --energy or --max-error")
    header, _, end = build_header(canonical({name: ref.spec for name, ref in container.tensors.items()}), container.stated)
    return 8 + len(header) + end


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A matrix under the budget: its spec and layer, its leading singular values and ‖D‖, and the name of a tied copy, if any."""

    spec: Spec
    layer: str
    sigma2: list[float]
    total: float
    copy: str | None = None


class Budget:
    """Ranks for many matrices in one file of at most `size` bytes, beside tensors that are saved whatever happens.

    Each matrix is charged its tensors and their entries in the header, every offset with as many digits as `size` has. What a
    format adds to several together (a bias spelt another way, siblings of a saved tensor) shows in the size of the whole plan,
    and what it is too large by is taken off the budget until it fits.
    """

    def __init__(self, size: int, code: str, saved: Mapping[str, Delta], encode: Encode, *, whole: bool) -> None:
        self.size, self.code, self.encode, self.whole, self.saved = size, code, encode, whole, dict(saved)
        self.fixed = self._file(self.saved)
        if self.saved:  # else the least is what the cheapest matrix takes, which `allocate` knows
            self._require(lambda: self.fixed)

    def _require(self, cost: Callable[[], int]) -> None:
        """Raise OptionError with the least size unless `cost` is within it; a larger size has more digits to count."""
        given = self.size
        while (least := cost()) > self.size:
            self.size = least
        if self.size > given:
            found, expected = f"{given} bytes", f"at least {self.size} bytes"
            raise OptionError("--size is too small for what must be in the file", found=found, expected=expected)

    def _file(self, deltas: Mapping[str, Delta]) -> int:
        """The size of the file that holds these."""
        return file_bytes(self.encode(deltas) if deltas else Container({}, {"format": "pt"}))

    def _cost(self, deltas: Mapping[str, Delta]) -> int:
        """Bytes these deltas add to the file, at most: their tensors, and for each its entry in the header."""
        return sum(ref.spec.nbytes + self._entry(name, ref.spec) for name, ref in self.encode(deltas).tensors.items())

    def _entry(self, name: str, spec: Spec) -> int:
        entry = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [self.size, self.size]}
        return len(json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode()) - 1

    def limit(self, candidate: Candidate) -> int:
        """The largest rank worth considering."""
        return max(1, min(*candidate.spec.matrix, (self.size - self.fixed) // self._per_rank(candidate)))

    def _per_rank(self, candidate: Candidate) -> int:
        return sum(candidate.spec.matrix) * BITS[self.code] // 8 * (2 if candidate.copy else 1)

    def allocate(self, candidates: Mapping[str, Candidate]) -> dict[str, int]:
        """A rank for each matrix, 0 to leave it out, DENSE to save it whole; OptionError with the minimum if nothing fits."""
        if candidates and not self.saved:
            self._require(lambda: self.fixed + PADDING + min(_least(self._module(name, found)) for name, found in candidates.items()))
        modules = [self._module(name, candidate) for name, candidate in candidates.items()]
        capacity = self.size - self.fixed - PADDING
        while capacity > 0:
            ranks = dict(zip(candidates, budget(modules, capacity), strict=True))
            excess = self._file(self.saved | self._plan(candidates, ranks)) - self.size
            if excess <= 0:
                return ranks
            capacity -= excess
        return dict.fromkeys(candidates, 0)

    def _module(self, name: str, candidate: Candidate) -> Module:
        per_rank, limit = self._per_rank(candidate), self.limit(candidate)
        # at the largest rank, whose digits in the header no other rank exceeds
        overhead = self._cost(self._planned(name, candidate, limit)) - per_rank * limit
        dense = self._cost(self._planned(name, candidate, DENSE)) if self.whole else None
        return Module(
            sigma2=candidate.sigma2, total=candidate.total, bytes_per_rank=per_rank, overhead=overhead, dense_bytes=dense, max_rank=limit
        )  # fmt: skip

    def _plan(self, candidates: Mapping[str, Candidate], ranks: Mapping[str, int]) -> dict[str, Delta]:
        plans = (self._planned(name, candidate, ranks[name]) for name, candidate in candidates.items() if ranks[name] != 0)
        return {name: delta for plan in plans for name, delta in plan.items()}

    def _planned(self, name: str, candidate: Candidate, rank: int) -> dict[str, Delta]:
        delta: Delta
        if rank == DENSE:
            delta = Replacement(value=InMemory(candidate.spec, b""))
        else:
            A = Spec(self.code, (rank, *candidate.spec.shape[1:]))
            B = Spec(self.code, (candidate.spec.shape[0], rank))
            delta = LowRank(A=InMemory(A, b""), B=InMemory(B, b""), alpha=rank, layer=candidate.layer)
        planned: dict[str, Delta] = {name: delta}
        if candidate.copy:
            planned[candidate.copy] = delta
        return planned


def _least(module: Module) -> int:
    return min(module.overhead + module.bytes_per_rank, module.dense_bytes or module.overhead + module.bytes_per_rank)
