"""A conversion under way: every delta beside its weight, all that cannot be done found before any work, then the work."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled
from loratools.errors import LoratoolsError, MatchError, raise_all
from loratools.families import Family
from loratools.formats.peft_config import CARRIED
from loratools.ops._algebra import bias_of, scaled_to, shares
from loratools.ops._base import Base
from loratools.ops._case import Converted, Job, case_of
from loratools.ops._convert_options import Options
from loratools.ops._to_dense import to_dense
from loratools.ops._to_dora import to_axis, to_dora
from loratools.ops._to_lora import to_lora
from loratools.plan import supplied

_MAKERS = {"lora": to_lora, "dora": to_dora, "dense": to_dense}


class Conversion:
    """An adapter, under its base's names if there is one, on its way to other kinds. `run` fills `deltas` and `converted`."""

    def __init__(self, source: Adapter, base: Base | None, options: Options) -> None:
        self.source, self.base, self.options = source, base, options
        self.converted: dict[str, Converted] = {}
        self.deltas: dict[str, Delta] = {}

    def run(self) -> None:
        """Every fault that headers tell is raised first, all together; nothing is computed before."""
        jobs: dict[str, Job | None] = {}
        faults: list[LoratoolsError] = []
        for name, delta in self.source.items():
            try:
                jobs[name] = self._job(name, delta)
            except LoratoolsError as error:
                faults.append(error.at(file=self.source.path, tensor=name))
        if self.options.axis and self.options.kind is None:
            self._check_doras()
        raise_all(faults)
        working = {name: job for name, job in jobs.items() if job is not None}
        workers.run_all([partial(self._run, name, job) for name, job in working.items()], self.options.threads)
        self.converted = {name: self.converted[name] for name in working}
        self.deltas = {name: self._delta(name, delta) for name, delta in self.source.items()}
        for name, delta in self.deltas.items():
            low = bias_of(name, self.deltas) if f"{name.rpartition('.')[0]}.weight" in self.converted else None
            if isinstance(delta, Full) and low is not None:
                self.deltas[name] = scaled_to(delta, low.scaling)[0]  # a bias is under the scaling of its module, as peft has it

    def _check_doras(self) -> None:
        kinds = sorted({delta.kind for delta in self.source.values()})
        if "dora" not in kinds:
            remedy = "--kind dora makes one, along this axis"
            raise MatchError("--magnitude-axis, and no DoRA in it", file=self.source.path, found=", ".join(kinds), remedy=remedy)

    def _job(self, name: str, delta: Delta) -> Job | None:
        """The work to be done, None for none; on a saved tensor, that which comes after it."""
        weight = self.base.weight(name) if self.base is not None and name in self.base else None
        if isinstance(delta, Chain) and isinstance(delta.first, Replacement):
            weight, delta = delta.first.value, delta.then
        if self.base is not None:
            delta = supplied(name, delta, self.base.checkpoint)
        case = case_of(name, delta, weight, self.base.family if self.base is not None else Family({}))
        return (_MAKERS[self.options.kind] if self.options.kind else to_axis)(case, self.options)

    def _run(self, name: str, job: Job) -> None:
        try:
            self.converted[name] = job()
        except LoratoolsError as error:
            raise error.at(file=self.source.path, tensor=name) from None

    def _delta(self, name: str, before: Delta) -> Delta:
        if name not in self.converted:
            return before
        made = self.converted[name].delta
        return replace(before, then=made) if isinstance(before, Chain) and isinstance(before.first, Replacement) else made

    def adapter(self) -> Adapter:
        """The adapter as it is now; what its file said of a method that it no longer is does not come along."""
        metadata = dict(self.source.metadata)
        peft = metadata.get("peft", {})
        if self.options.kind and "peft_type" in peft:
            metadata["peft"] = {key: value for key, value in peft.items() if key in CARRIED}
        return replace(self.source, deltas=self.deltas, metadata=metadata, expects=None)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each delta that was converted; to be asked for once all is written, as some are measured then."""
        for found in self.converted.values():
            found.measure()
        share = shares([found.norm for found in self.converted.values()])
        pairs = zip(self.converted.items(), share, strict=True)
        return [found.row(name, self.source[name], part) for (name, found), part in pairs]

    def notes(self) -> list[str]:
        told = [f"{name}: {found.note}" for name, found in self.converted.items() if found.note]
        flat = [name for name in self.converted if self.base is None and _flat(self.source[name])]
        if flat:
            told.append(f"{len(flat)} tensors are taken for linear layers' weights: of a convolution's kernel only --base would tell")
        return told


def _flat(delta: Delta) -> bool:
    inner = delta.delta if isinstance(delta, Unsettled) else delta
    return isinstance(inner, Additive) and inner.flat and not inner.kernel_shape
