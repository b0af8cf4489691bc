"""One budget of bytes over a whole adapter: the file that holds its weights, header and saved tensors counted, fits it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import OptionError
from loratools.formats.base import Container
from loratools.linalg.ranks import DENSE, Module, budget
from loratools.tensorfile import BITS, InMemory, Spec

__all__ = ["DENSE", "Budget", "Candidate", "parse_size"]

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
Encode = Callable[[Mapping[str, Delta]], Container]


def parse_size(size: str | int) -> int:
    """Bytes from `40MB`, `1.5GiB`, `300 kB` or a number.

    >>> parse_size("1.5MiB")
    1572864
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    if not found or found[2] not in _UNITS or isinstance(size, bool):
        raise OptionError("--size", found=size, expected="bytes, as in 40MB, 1.5GiB or 300000")
    return int(float(found[1]) * _UNITS[found[2]])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A matrix under the budget: its spec and layer, its leading singular values and ‖D‖, and the name of a tied copy, if any."""

    spec: Spec
    layer: str
    sigma2: list[float]
    total: float
    copy: str | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        return self.spec.matrix


class Budget:
    """Ranks for many matrices in one file of at most `size` bytes beside tensors that are saved whatever happens.

    Bytes of the header are bounded from above: every offset is written with as many digits as `size` has, every rank with as
    many as the largest, so the file is never larger than planned.
    """

    def __init__(self, size: int, code: str, saved: Mapping[str, Delta], encode: Encode, *, whole: bool) -> None:
        self.size, self.code, self.encode, self.whole = size, code, encode, whole
        self.saved = dict(saved)
        self.fixed = 8 + len('{"__metadata__":{"format":"pt"},}') + 7 + (self._cost(self.saved) if saved else 0)
        if self.fixed > size:
            raise self._impossible(self.fixed)

    def _impossible(self, least: int) -> OptionError:
        found, expected = f"{self.size} bytes", f"at least {least} bytes"
        return OptionError("--size is too small for what must be in the file", found=found, expected=expected)

    def _cost(self, deltas: Mapping[str, Delta]) -> int:
        """Bytes these deltas add to the file, at most: their tensors, and for each its entry in the header."""
        container = self.encode(deltas)
        listed = len(json.dumps(container.metadata, ensure_ascii=False).encode()) if len(container.metadata) > 1 else 0
        return listed + sum(ref.spec.nbytes + self._entry(name, ref.spec) for name, ref in container.tensors.items())

    def _entry(self, name: str, spec: Spec) -> int:
        # no offset has more digits than the size of the file
        entry = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [self.size, self.size]}
        return len(json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode()) - 1

    def limit(self, candidate: Candidate) -> int:
        """The largest rank worth considering."""
        rows, columns = candidate.matrix
        per_rank = self._per_rank(candidate)
        return max(1, min(rows, columns, (self.size - self.fixed) // per_rank))

    def _per_rank(self, candidate: Candidate) -> int:
        return sum(candidate.matrix) * BITS[self.code] // 8 * (2 if candidate.copy else 1)

    def allocate(self, candidates: Mapping[str, Candidate]) -> dict[str, int]:
        """A rank for each matrix, 0 to leave it out, DENSE to save it whole; OptionError with the minimum if nothing fits."""
        modules = [self._module(name, candidate) for name, candidate in candidates.items()]
        ranks = dict(zip(candidates, budget(modules, self.size - self.fixed), strict=True))
        if modules and not self.saved and not any(ranks.values()):
            least = min(min(module.overhead + module.bytes_per_rank, module.dense_bytes or 1 << 62) for module in modules)
            raise self._impossible(self.fixed + least)
        return ranks

    def _module(self, name: str, candidate: Candidate) -> Module:
        per_rank, limit = self._per_rank(candidate), self.limit(candidate)
        # at the largest rank, whose digits in the header no other rank exceeds
        factors = self._cost(self._planned(name, candidate, limit)) - per_rank * limit
        dense = self._cost(self._planned(name, candidate, DENSE)) if self.whole else None
        return Module(
            sigma2=candidate.sigma2, total=candidate.total, bytes_per_rank=per_rank, overhead=factors, dense_bytes=dense, max_rank=limit
        )  # fmt: skip

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
