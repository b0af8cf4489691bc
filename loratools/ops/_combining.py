"""The terms of a combination, tensor by tensor, each by its way (`_meeting`), and what is told of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from loratools import threads as workers
from loratools.changes import Changes
from loratools.compress import rounded, widest
from loratools.deltas.base import Additive, Delta
from loratools.deltas.full import Full, Replacement
from loratools.errors import LoratoolsError, UnsupportedError
from loratools.factors import Factored, form_of
from loratools.ops._algebra import bias_of, rank_of, relative, shares
from loratools.ops._base import Base
from loratools.ops._combine_options import Options
from loratools.ops._core_sum import summed
from loratools.ops._dense_sum import factored, whole
from loratools.ops._meeting import Terms, own_layer, rank_needed, routes
from loratools.refs import Ref, Spec
from loratools.tensors import read_tensor, to_ref, torch_dtype

Progress = Callable[[int, int], None]  # of the changes that are made dense, bytes done and in all


class Combination:
    """What becomes of every tensor. `run` fills `deltas`; `rows` tells of each what it was made of, and its error."""

    def __init__(self, terms: Mapping[str, Terms], options: Options, base: Base | None = None, progress: Progress | None = None) -> None:
        self.terms, self.options, self.base, self.progress = terms, options, base, progress
        self.routes = routes(terms, options, self._weight)
        self.deltas: dict[str, Delta] = {}
        self.factored: dict[str, Factored] = {}
        self.errors: dict[str, float] = {}
        self.dense = {name: self._spec(name).numel * 4 for name, way in self.routes.items() if way == "dense"}
        self.done, self.lock = 0, threading.Lock()

    def run(self, count: int) -> None:
        """Every tensor, `count` at a time; what is drawn, rounded and written does not depend on how many."""
        work = {"core": self._core, "dense": self._dense}
        workers.run_all([partial(self._placed, work[way], name) for name, way in self.routes.items() if way in work], count)
        for name, way in self.routes.items():  # differences of biases come after the LoRA whose scaling they share
            if way == "full":
                self._placed(self._full, name)
            elif way == "whole":
                self._placed(self._whole, name)
            elif way == "kept":
                self.deltas[name] = self.terms[name][0].delta
            else:
                self.deltas[name] = self.factored[name].delta

    def _placed(self, work: Callable[[str], None], name: str) -> None:
        try:
            work(name)
        except LoratoolsError as error:
            found = [term.file for term in self.terms[name]]
            raise error.at(file=found[0] if len(found) == 1 else None, tensor=name) from None

    # -- one tensor

    def _core(self, name: str) -> None:
        terms = [(term.delta, term.weight) for term in self.terms[name] if isinstance(term.delta, Additive)]
        found = summed(terms, self.options, self._spec(name).shape, self._layer(name))
        if found is not None:
            self.factored[name] = found
        elif not self.options.chosen:
            raise rank_needed()
        else:
            self._dense(name)

    def _dense(self, name: str) -> None:
        terms = [(term.delta, term.weight, term.order) for term in self.terms[name]]
        how = {"code": self._code(name), "layer": self._layer(name)}
        self.factored[name] = factored(name, terms, self._spec(name), self._weight(name), self.options, **how)
        with self.lock:
            self.done += self.dense.get(name, 0)
            if self.progress and self.dense:
                self.progress(self.done, sum(self.dense.values()))

    def _full(self, name: str) -> None:
        """What is stored whole, under the scaling of its module's LoRA."""
        low = bias_of(name, {key: found.delta for key, found in self.factored.items()})
        terms = [(term.delta, term.weight, term.order) for term in self.terms[name]]
        scaling = low.scaling if low is not None else 1.0
        first, times, _ = terms[0]
        same = len(terms) == 1 and not self.options.sparse and isinstance(first, Full) and first.scale * times == scaling
        if same and isinstance(first, Full) and self.options.code in (None, first.diff.spec.dtype):
            self.errors[name], self.deltas[name] = 0.0, replace(first, scale=scaling)
            return
        exact = whole(name, terms, self._spec(name), self._weight(name), self.options)
        code = self._code(name)
        if scaling == 0 and bool(exact.any()):
            raise UnsupportedError("a bias difference under a scaling of 0", tensor=name)
        stored = rounded(exact / (scaling or 1.0), code)
        self.errors[name] = relative(read_tensor(stored, exact.dtype) * scaling - exact, exact)
        self.deltas[name] = Full(diff=stored, scale=scaling)

    def _whole(self, name: str) -> None:
        """W + w·(V − W) of a saved tensor V, rounded once to V's own dtype."""
        import torch

        assert self.base is not None
        term, weight = self.terms[name][0], self.base.weight(name)
        code = self.options.code or next(iter(term.delta.refs().values())).spec.dtype
        changes = Changes([(term.delta, term.weight)], weight.spec, weight)
        out = torch.empty(changes.rows, changes.columns, dtype=torch_dtype(code))
        for part in changes.parts():
            out[part] = read_tensor(rounded(changes.base(part) + changes(part)[0], code))
        self.deltas[name] = Replacement(value=to_ref(out.reshape(weight.spec.shape)))

    # -- what is known of it

    def _code(self, name: str) -> str:
        """The dtype that a sum is written in."""
        return self.options.code or ("F64" if widest([term.delta for term in self.terms[name]]) == "F64" else "F32")

    def _weight(self, name: str) -> Ref | None:
        return self.base.weight(name) if self.base is not None and name in self.base else None

    def _spec(self, name: str) -> Spec:
        if self.base is not None and name in self.base:
            return self.base.weight(name).spec
        first = self.terms[name][0].delta
        assert isinstance(first, Additive)
        return Spec("F32", first.shape())

    def _layer(self, name: str) -> str:
        """What layer the LoRA on it is of: what a term says, else the base's family, else open."""
        stated = [layer for term in self.terms[name] if (layer := own_layer(term.delta)) not in (None, "unknown")]
        if stated:
            return str(stated[0])
        spec = self._spec(name)
        if self.base is None or name not in self.base:
            return "unknown" if len(spec.shape) == 2 else "conv"
        layer, reason = form_of(name, spec, self.base.family)
        if layer is None:
            raise UnsupportedError(f"what becomes of it has no low-rank form: {reason}")
        return layer

    def rows(self) -> list[dict[str, Any]]:
        """The receipt's rows."""
        share = dict(zip(self.factored, shares([found.norm for found in self.factored.values()]), strict=True))
        return [self._row(name, share.get(name)) for name in self.terms]

    def _row(self, name: str, share: float | None) -> dict[str, Any]:
        found, terms = self.factored.get(name), self.terms[name]
        error = found.error / found.norm if found and found.norm else self.errors.get(name, 0.0)
        return {
            "name": name, "kind": "+".join(dict.fromkeys(term.delta.kind for term in terms)), "adapters": len(terms),
            "rank_before": _rank(terms), "rank": found.delta.rank if found else _rank([terms[0]]), "error": error,
            "optimal_error": found.optimal / found.norm if found and found.norm else 0.0, "energy": max(0.0, 1 - error**2),
            "share": share,
        }  # fmt: skip


def _rank(terms: Terms) -> int | None:
    """The sum of the ranks of the terms' LoRAs, None where one has none."""
    ranks = [rank_of(term.delta) for term in terms]
    return sum(rank for rank in ranks if rank is not None) if None not in ranks else None
