"""An extraction under way: every tensor compared, every change measured, and given a delta or a reason to be left out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from blake3 import blake3

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.differences import Compared, Difference, compare, difference, digest, measurable
from loratools.errors import LoratoolsError, MatchError, OptionError, UnsupportedError, raise_all
from loratools.factors import Factored, factor, form_of, reach
from loratools.formats import FORMATS, encode
from loratools.formats.base import Container, ReadOptions
from loratools.ops._extract_options import Options
from loratools.ops._pair import Pair
from loratools.refs import BITS

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.ops._size import Candidate

Progress: TypeAlias = Callable[[int, int], None]  # bytes read so far, bytes to read in all
COSTLY = "factors of this rank would take more bytes than the tensor"
TOO_FAR = "no rank stays within --max-error or --energy"


@dataclass
class Change:
    """One tensor that changed: its norms, the layer it can be a LoRA of or the reason it cannot, and what became of it."""

    name: str
    norm: float | None = None
    relative_norm: float | None = None
    unchanged: float | None = None
    layer: str | None = None
    reason: str = ""
    sigma2: list[float] = field(default_factory=list)
    delta: Delta | None = None
    factored: Factored | None = None

    def row(self) -> dict[str, Any]:
        """The receipt's row; a tensor saved whole has no error."""
        known, rank = self.factored, self.delta.rank if isinstance(self.delta, LowRank) else None
        error, optimal = (known.error / known.norm, known.optimal / known.norm) if known and known.norm else (0.0, 0.0)
        return {
            "name": self.name, "kind": self.delta.kind if self.delta else None, "relative_norm": self.relative_norm, "survived": None,
            "unchanged": self.unchanged, "sampled": 1.0, "rank": rank, "error": error, "optimal_error": optimal,
            "energy": max(0.0, 1 - error**2),
        }  # fmt: skip


class Extraction:
    """Every tensor of a pair of checkpoints, on its way to a delta. `run` fills `compared`, `alone` and `changes`, in file order.

    With `spectra` every factored change has singular values to twice its rank, for a picture of what more ranks would give.
    """

    def __init__(self, pair: Pair, options: Options, progress: Progress | None = None, *, spectra: bool = False) -> None:
        self.pair, self.options, self.progress, self.spectra = pair, options, progress, spectra
        self.compared: dict[str, Compared] = {}
        self.alone: dict[str, tuple[str | None, str | None]] = {}
        self.changes: dict[str, Change] = {}
        self.done, self.total, self.lock = 0, pair.base.nbytes + pair.tuned.nbytes, threading.Lock()

    def run(self) -> None:
        jobs = [partial(self._compare, name) for name in self.pair.common] + [partial(self._digest, name) for name in self.pair.alone]
        workers.run_all(jobs, self.options.threads)
        if not self.changes:
            found = f"{len(self.compared)} tensors"
            raise MatchError("nothing to extract: the tensors that both have are equal", file=self.pair.tuned.path, found=found)
        self.changes = {name: self.changes[name] for name in self.pair.common if name in self.changes}
        if self.options.rest == "error":
            raise_all(self._refused())
        if self.options.size is not None:
            self._fit(self.options.size)
        if tie := self.tied():
            change = self.changes[tie[0]]
            delta = replace(change.delta, layer="linear") if isinstance(change.delta, LowRank) else change.delta
            self.changes[tie[1]] = replace(change, name=tie[1], delta=delta)

    def tied(self) -> tuple[str, str] | None:
        """(embedding, head) of a tied model whose embedding changed: the head is the same tensor, so it changes alike."""
        tie = self.pair.tie()
        if tie is None or tie[0] not in self.changes:
            return None
        one, other = self.compared[tie[0]], self.compared.get(tie[1])
        return tie if other is None or (other.base, other.tuned) == (one.base, one.tuned) else None

    def _refused(self) -> list[LoratoolsError]:
        remedy = "give --rest save or --rest drop, or --exclude with its name"
        return [
            UnsupportedError(f"changed, and has no low-rank form: {change.reason}", file=self.pair.tuned.path, tensor=name, remedy=remedy)
            for name, change in self.changes.items()
            if change.layer is None and not self.pair.reason(name)
        ]

    # -- one tensor

    def _digest(self, name: str) -> None:
        base, tuned = (checkpoint.get(name) for checkpoint in (self.pair.base, self.pair.tuned))
        self.alone[name] = (digest(base) if base else None, digest(tuned) if tuned else None)
        self._tell(sum(ref.spec.nbytes for ref in (base, tuned) if ref))

    def _compare(self, name: str) -> None:
        base, tuned = self.pair.base[name], self.pair.tuned[name]
        self.compared[name] = found = compare(base, tuned)
        if not found.same:
            try:
                change = self._change(name)
            except LoratoolsError as error:
                raise error.at(file=self.pair.tuned.path, tensor=name) from None
            if change:
                self.changes[name] = change
        self._tell(base.spec.nbytes + tuned.spec.nbytes)

    def _tell(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.progress:
                self.progress(self.done, self.total)

    def _change(self, name: str) -> Change | None:
        """The change of a tensor whose bytes differ; None if its values do not (another dtype, the sign of a zero)."""
        base, tuned = self.pair.base[name].spec, self.pair.tuned[name].spec
        excluded = self.pair.reason(name)
        if not (measurable(base) and measurable(tuned)):
            return self._rest(Change(name, reason=excluded or "not numbers"))
        found = self._difference(name)
        if found.norm == 0 and base.floating:
            return None
        change = Change(name, found.norm, found.relative_norm, found.unchanged)
        change.layer, change.reason = (None, excluded) if excluded else form_of(name, base, self.pair.family)
        if change.layer is None:
            return self._rest(change)
        if self.options.size is not None:
            change.sigma2 = self._spectrum(name, found, 8)
        else:
            self._settle(change, found)
            if self.spectra and change.factored:
                change.sigma2 = self._spectrum(name, found, max(8, 2 * change.factored.delta.rank))
        return change

    def _difference(self, name: str) -> Difference:
        return difference(self.pair.base[name], self.pair.tuned[name], wide=self.options.how.exact)

    def _rest(self, change: Change) -> Change:
        """The tuned tensor itself as the delta, if that is what becomes of the rest."""
        if self.options.rest == "save" and not self.pair.reason(change.name):
            change.delta = Replacement(value=self.pair.tuned[change.name])
        return change

    def _settle(self, change: Change, found: Difference) -> None:
        """Give the change its factors, or the whole tensor where that takes fewer bytes or no rank is near enough."""
        rank = self.options.rank
        known = None if rank is not None and self._costly(change.name, rank) else self._factored(change, found, rank)
        if known and not self._costly(change.name, known.delta.rank):
            change.factored, change.delta = known, known.delta
        elif self.options.rest == "save":
            change.reason = COSTLY if known or rank is not None else TOO_FAR
            self._rest(change)
        else:
            raise OptionError(TOO_FAR, found=f"{self.options.how.code} factors", remedy="give a wider --dtype, or --rest save")

    def _costly(self, name: str, rank: int) -> bool:
        """Whether factors of a rank take more bytes than the tensor; where nothing is saved whole it does not matter."""
        spec = self.pair.tuned[name].spec
        taken = min(rank, *spec.matrix) * sum(spec.matrix) * BITS[self.options.how.code] // 8
        return self.options.rest == "save" and taken > spec.nbytes

    def _factored(self, change: Change, found: Difference, rank: int | None) -> Factored | None:
        D, shape, layer = self._matrix(change.name, found), self.pair.tuned[change.name].spec.shape, change.layer or "unknown"
        how = replace(self.options.how, seed=self._seed(change.name))
        if rank is not None:
            return factor(D, min(rank, *D.shape), how, shape=shape, layer=layer, rounding=found.rounding)
        assert self.options.limit is not None
        return reach(D, self.options.limit, how, shape=shape, layer=layer, rounding=found.rounding)

    def _matrix(self, name: str, found: Difference) -> Tensor:
        return found.D.view(self.pair.tuned[name].spec.matrix).to(self.options.device)

    def _seed(self, name: str) -> int:
        """A seed of the tensor's own, so that the order of the work does not matter."""
        return int.from_bytes(blake3(f"{self.options.how.seed}:{name}".encode()).digest(7), "little")

    def _spectrum(self, name: str, found: Difference, top: int) -> list[float]:
        from loratools.linalg.spectrum import spectrum

        D = self._matrix(name, found)
        sigma, _ = spectrum(D, top=min(top, *D.shape), tolerance=self.options.how.tolerance, seed=self._seed(name))
        return [float(value) ** 2 for value in sigma]

    # -- one budget for all

    def _fit(self, size: int) -> None:
        """Ranks under the budget: a spectrum that the budget uses up is lengthened and asked again, then all are factored."""
        from loratools.ops._size import DENSE, Budget

        saved = {name: change.delta for name, change in self.changes.items() if change.delta is not None}
        budget = Budget(size, self.options.how.code, saved, self._encode, whole=self.options.rest == "save")
        while True:
            candidates = self._candidates()
            ranks = budget.allocate(candidates)
            short = [name for name, found in candidates.items() if ranks[name] == len(found.sigma2) < budget.limit(found)]
            if not short:
                break
            workers.run_all([partial(self._lengthen, name) for name in short], self.options.threads)
        for name, rank in ranks.items():
            change = self.changes[name]
            change.reason = "" if rank > 0 else "no room for it under --size"
            if rank == DENSE:
                change.reason = "better whole, for its share of --size"
                self._rest(change)
        workers.run_all([partial(self._refactor, name, rank) for name, rank in ranks.items() if rank > 0], self.options.threads)

    def _candidates(self) -> dict[str, Candidate]:
        from loratools.ops._size import Candidate

        tie = self.tied()
        return {
            name: Candidate(
                spec=self.pair.tuned[name].spec, layer=change.layer, sigma2=change.sigma2, total=(change.norm or 0.0) ** 2,
                copy=tie[1] if tie and tie[0] == name else None,
            )
            for name, change in self.changes.items()
            if change.layer is not None and not (tie and name == tie[1])
        }  # fmt: skip

    def _lengthen(self, name: str) -> None:
        change = self.changes[name]
        change.sigma2 = self._spectrum(name, self._difference(name), 2 * len(change.sigma2))

    def _refactor(self, name: str, rank: int) -> None:
        change = self.changes[name]
        change.factored = self._factored(change, self._difference(name), rank)
        change.delta = change.factored.delta if change.factored else None

    # -- what the format needs

    def _encode(self, deltas: Mapping[str, Delta]) -> Container:
        return encode(self.adapter(deltas), self.options.format)

    def adapter(self, deltas: Mapping[str, Delta]) -> Adapter:
        """The deltas as an adapter whose file promises no tensor that it does not hold.

        A format that saves whole modules saves all tensors of one, and peft's lists of modules match by the ends of names, so
        they may take in a module that did not change: such a matrix is excluded by its name, anything else saved as it is.
        """
        row = next(row for row in FORMATS if row.name == self.options.format)
        source = {"peft": {"base_model_name_or_path": self.pair.source()}}
        adapter = Adapter(deltas=dict(deltas), metadata=source, model=self.pair.family.config)
        excluded: list[str] = []
        while True:
            assert row.encode is not None
            promised = row.decode(row.encode(adapter), ReadOptions()).expects
            missing = [name for name in (promised(self.pair.base.specs) if promised else ()) if name not in adapter]
            if not missing:
                return adapter
            matrices = [name for name in missing if len(self.pair.base[name].spec.shape) > 1 and name not in excluded]
            excluded += matrices
            kept = {name: Replacement(value=self.pair.base[name]) for name in missing if name not in matrices}
            peft = adapter.metadata["peft"] | ({"exclude_modules": [name.removesuffix(".weight") for name in excluded]} if excluded else {})
            adapter = replace(adapter, deltas={**adapter.deltas, **kept}, metadata={"peft": peft})
