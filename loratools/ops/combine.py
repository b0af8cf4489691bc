"""combine: Σ wᵢ·ΔWᵢ of several adapters as one, or what a method makes of these changes; never of the factors.

The factors' concatenation is the sum exactly; through the QR of both sides and a small core in float64 it is written again at
the rank it has, or at one asked for. What prunes and votes (TIES, DARE, DELLA, magnitude pruning), and what depends on the base
(DoRA), is done on the dense changes, block by block, and truncated. Averaging the Aᵢ and the Bᵢ apart from each other is another
thing, with cross terms BᵢAⱼ, and there is no method for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.errors import MatchError, UsageError
from loratools.formats.base import read_options
from loratools.formats.reading import Reading, arguments, paths, reads
from loratools.ops._algebra import format_of, label, loaded, low_of, rank_of, write
from loratools.ops._base import Base, resolved
from loratools.ops._combine_options import DEFAULTS, checked
from loratools.ops._combining import Combination
from loratools.ops._meeting import Term, Terms
from loratools.output import check_output
from loratools.planning import split_strength
from loratools.receipt import Receipt
from loratools.refs import Ref


@reads
def combine(
    adapters: Sequence[str | Path | Adapter | tuple[str | Path | Adapter, float]],
    out: str | Path,
    *,
    method: str = "sum",
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    density: float | None = None,
    majority_sign: str | None = None,
    epsilon: float | None = None,
    seed: int | None = None,
    dtype: str | None = None,
    format: str | None = None,
    sha256: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Write what a method makes of adapters (`path`, `path:weight` or (adapter, weight)) as one adapter; returns the receipt.

    `sum` is Σ wᵢ·ΔWᵢ: ranks, alphas, rsLoRA, dtypes, kinds and the modules may differ; weights may be negative. Without `rank`,
    `energy` or `max_error` every module gets the rank that its sum has, and loses nothing but the rounding to float32 (or `dtype`,
    or float64 where an adapter has it); with one, the best of that rank, or the least rank within the error. A module of one
    adapter alone keeps its factors, its alpha taking the weight. Biases add up, a saved tensor must be of one adapter at weight 1 or
    the same bytes in all that have it. With `base`, DoRA and every other kind is summed as wᵢ·(applyᵢ(W) − W).

    `ties`, `dare-linear`, `dare-ties`, `magnitude-prune` and `della` prune each ΔWᵢ to the share `density` and put together what
    is left (spec/algebra.md); `majority_sign` is "total" or "frequency", `epsilon` della's half range of chances, `seed` of what
    is drawn. They need one way to choose ranks. `progress` is told bytes of dense changes done and in all, from several threads.

    Raises OptionError for options that have no meaning together, UnsupportedError for DoRA that would be scaled or meet another
    without `base`, MatchError for deltas that cannot be summed, ShapeError for shapes that differ.

    >>> receipt = combine(["style/:0.7", "subject/:0.5"], "both/", rank=32)  # doctest: +SKIP
    >>> receipt["applied"] == receipt["expected"]  # doctest: +SKIP
    True
    """
    words = arguments(locals(), "adapters", "out", "progress")
    options = checked(words)
    given = [_weighted(item) for item in ([adapters] if isinstance(adapters, str | Path | Adapter) else adapters)]
    _check(given, threads)
    target = check_output(out, overwrite=overwrite, inputs=paths(reading, [item for item, _ in given], base))
    said = [label(item) + (f":{weight:g}" if weight != 1 else "") for item, weight in given]
    used = {word: getattr(options, word) for word in DEFAULTS if options.takes(word)}
    receipt = Receipt("combine", {"adapters": said, "out": str(out), **words, **used})
    read_as, count = read_options(reading), threads or workers.default_threads()
    on = None if base is None else Base(base, reading)
    sources = [loaded(item, read_as) for item, _ in given]
    read = list(zip(resolved(sources, on), [weight for _, weight in given], strict=True))
    terms = _terms(read)
    with workers.single_threaded_blas():
        work = Combination(terms, options, on, progress)
        work.run(count)
    receipt.expected, receipt.applied = sum(len(one) for one, _ in read), sum(len(found) for found in terms.values())
    receipt.tensors = work.rows()
    receipt.notes = list(dict.fromkeys(note for one, _ in read for note in one.notes)) + _notes(read, terms)
    receipt.inputs = [on.input(count)] if on is not None else []
    joined = _joined([one for one, _ in read], work.deltas)
    return write(receipt, joined, sources, target, format_of(format, sources[0]), sha256=sha256)


def _weighted(item: str | Path | Adapter | tuple[str | Path | Adapter, float]) -> tuple[str | Path | Adapter, float]:
    return (item[0], float(item[1])) if isinstance(item, tuple) else split_strength(item)


def _check(given: Sequence[tuple[Any, float]], threads: int | None) -> None:
    if not given:
        raise UsageError("adapters to combine", found="none", expected="one or more")
    for item, weight in given:
        if not math.isfinite(weight):
            raise UsageError("a weight must be finite", found=f"{label(item)}:{weight}")
    if threads is not None and threads < 1:
        raise UsageError("--threads", found=threads, expected="at least 1")


def _terms(read: Sequence[tuple[Adapter, float]]) -> dict[str, Terms]:
    """Every tensor's deltas with their weights, in the order of the adapters."""
    terms: dict[str, Terms] = {}
    for index, (adapter, weight) in enumerate(read):
        for name, delta in adapter.items():
            terms.setdefault(name, []).append(Term(delta, weight, index, adapter.path))
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
    """How many adapters meet on how many tensors, what differs between their deltas, and whether their files name one base."""
    if len(read) == 1:
        return []
    met = Counter(len(found) for found in terms.values())
    notes = [", ".join(f"{met[count]} tensors are in {count} of the {len(read)} adapters" for count in sorted(met))]
    if set(met) == {1}:
        notes.append("no tensor is in two of them: are they adapters of one base, under the same names?")
    mixed = _mixed([term.delta for found in terms.values() for term in found])
    notes += [f"mixed: {mixed}"] if mixed else []
    bases = {str(one.metadata.get("peft", {}).get("base_model_name_or_path")) for one, _ in read} - {"None"}
    if len(bases) > 1:
        notes.append(f"they name different bases: {', '.join(sorted(bases))}")
    return notes


def _mixed(deltas: Sequence[Delta]) -> str:
    """The kinds, ranks and dtypes that differ, each counted."""
    ranked = [(delta, rank) for delta in deltas if (rank := rank_of(delta)) is not None]
    counts: dict[str, Counter[Any]] = {
        "kinds": Counter(delta.kind for delta in deltas),
        "ranks": Counter(rank for _, rank in ranked),
        "rsLoRA": Counter("with" if lora.rslora else "without" for lora in (low_of(delta) for delta, _ in ranked) if lora is not None),
        "dtypes": Counter("+".join(sorted({ref.spec.dtype for ref in delta.refs().values()})) for delta, _ in ranked),
    }
    return "; ".join(f"{what} {_counted(found)}" for what, found in counts.items() if len(found) > 1)


def _counted(found: Mapping[Any, int]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in sorted(found.items(), key=lambda item: (-item[1], str(item[0])))[:8])
