"""combine: Σ wᵢ·ΔWᵢ of several adapters as one, summed as changes of the weight and never as factors.

The factors' concatenation is the sum exactly; through the QR of both sides and a small core in float64 it is written again at
the rank it has, or at one asked for. Averaging the Aᵢ and the Bᵢ apart from each other is another thing, with cross terms
BᵢAⱼ, and there is no method for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import MatchError, OptionError
from loratools.ops._algebra import format_of, label, loaded, write
from loratools.ops._combining import Combination, Terms
from loratools.output import check_output
from loratools.plan import split_strength
from loratools.receipt import Receipt
from loratools.tensorfile import Ref
from loratools.tensors import dtype_code

METHODS = ("sum",)


def combine(
    adapters: Sequence[str | Path | Adapter | tuple[str | Path | Adapter, float]],
    out: str | Path,
    *,
    method: str = "sum",
    rank: int | None = None,
    dtype: str | None = None,
    alpha_in: float | None = None,
    format: str | None = None,
    sha256: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write Σ wᵢ·ΔWᵢ of adapters (`path`, `path:weight` or (adapter, weight)) as one adapter; returns the receipt.

    Ranks, alphas, rsLoRA, dtypes and the modules may differ; weights may be negative. Without `rank` every module gets the rank
    that its sum has, and loses nothing but the rounding to float32 (or `dtype`, or float64 where an adapter has it); with it, the
    best of at most that rank. A module of one adapter alone keeps its factors, its alpha taking the weight. Biases add up, a saved
    tensor must be of one adapter at weight 1 or the same bytes in all that have it. Raises OptionError for a method there is not,
    UnsupportedError for DoRA that would be scaled or meet another (that takes the base), MatchError for deltas that cannot be
    summed, ShapeError for shapes that differ.

    >>> receipt = combine(["style/:0.7", "subject/:0.5"], "both/", rank=32)  # doctest: +SKIP
    >>> receipt["applied"] == receipt["expected"]  # doctest: +SKIP
    True
    """
    arguments = {name: value for name, value in locals().items() if name not in ("adapters", "out")}
    given = [_weighted(item) for item in ([adapters] if isinstance(adapters, str | Path | Adapter) else adapters)]
    _check(given, method, rank, threads)
    target = check_output(out, overwrite=overwrite, inputs=[item for item, _ in given if not isinstance(item, Adapter)])
    said = [label(item) + (f":{weight:g}" if weight != 1 else "") for item, weight in given]
    receipt = Receipt("combine", {"adapters": said, "out": str(out), **arguments})
    read = [(loaded(item, alpha_in), weight) for item, weight in given]
    terms = _terms(read)
    with workers.single_threaded_blas():
        work = Combination(terms, rank=rank, code=dtype_code(dtype) if dtype else None)
        work.run(threads or workers.default_threads())
    receipt.expected, receipt.applied = sum(len(one) for one, _ in read), sum(len(found) for found in terms.values())
    receipt.tensors = work.rows()
    receipt.notes = [note for one, _ in read for note in one.notes] + _notes(read, terms)
    sources = [one for one, _ in read]
    return write(receipt, _joined(sources, work.deltas), sources, target, format_of(format, sources[0]), sha256=sha256)


def _weighted(item: str | Path | Adapter | tuple[str | Path | Adapter, float]) -> tuple[str | Path | Adapter, float]:
    return (item[0], float(item[1])) if isinstance(item, tuple) else split_strength(item)


def _check(given: Sequence[tuple[Any, float]], method: str, rank: int | None, threads: int | None) -> None:
    if method not in METHODS:
        raise OptionError("unknown --method", found=method, expected=" or ".join(METHODS))
    if not given:
        raise OptionError("adapters to combine", found="none", expected="one or more")
    for item, weight in given:
        if not math.isfinite(weight):
            raise OptionError("a weight must be finite", found=f"{label(item)}:{weight}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise OptionError("--rank", found=rank, expected="a whole number of at least 1")
    if threads is not None and threads < 1:
        raise OptionError("--threads", found=threads, expected="at least 1")


def _terms(read: Sequence[tuple[Adapter, float]]) -> dict[str, Terms]:
    """Every tensor's deltas with their weights, in the order of the adapters."""
    terms: dict[str, Terms] = {}
    for adapter, weight in read:
        for name, delta in adapter.items():
            terms.setdefault(name, []).append((delta, weight, adapter.path))
    return terms


def _joined(sources: Sequence[Adapter], deltas: Mapping[str, Delta]) -> Adapter:
    """The sum with what the adapters' files agree on; the base's name is kept where it is one."""
    first = sources[0]
    peft = {
        key: value
        for key, value in first.metadata.get("peft", {}).items()
        if all(other.metadata.get("peft", {}).get(key) == value for other in sources)
    }
    if any(other.metadata.get("peft", {}).get("fan_in_fan_out") for other in sources):
        peft["fan_in_fan_out"] = True  # peft's flag is the last wrapped module's, so files of one base may differ
    passengers: dict[str, Ref] = {}
    for one in sources:
        for name in one.passengers.keys() & passengers.keys():
            raise MatchError("two adapters carry this tensor, which is no weight's change", file=one.path, tensor=name)
        passengers |= one.passengers
    return replace(first, deltas=dict(deltas), metadata={"peft": peft}, passengers=passengers, expects=None)


def _notes(read: Sequence[tuple[Adapter, float]], terms: Mapping[str, Terms]) -> list[str]:
    """How many adapters meet on how many tensors, and whether their files name one base."""
    if len(read) == 1:
        return []
    met = Counter(len(found) for found in terms.values())
    notes = [", ".join(f"{met[count]} tensors are in {count} of the {len(read)} adapters" for count in sorted(met))]
    if set(met) == {1}:
        notes.append("no tensor is in two of them: are they adapters of one base, under the same names?")
    bases = {str(one.metadata.get("peft", {}).get("base_model_name_or_path")) for one, _ in read} - {"None"}
    if len(bases) > 1:
        notes.append(f"they name different bases: {', '.join(sorted(bases))}")
    return notes
