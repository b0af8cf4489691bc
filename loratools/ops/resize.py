"""resize: an adapter at other ranks, each module by the SVD of its own product through an r × r core, in float64.

Below a module's rank the result is the best there is, its error stated beside the best as it is stored; above it, zeros are
added and nothing changes. The scaling of each module stays, so alpha follows the rank, and biases keep their bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Full
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, MatchError, UsageError, raise_all
from loratools.factors import Factored
from loratools.formats import encode
from loratools.formats.base import Container, read_options
from loratools.formats.reading import Reading, arguments, paths, reads
from loratools.ops._algebra import bias_of, format_of, label, loaded, low_of, scaled_to, shares, with_low, write
from loratools.ops._resizing import Policy, following, ranks_within, reached, resized, squares
from loratools.output import check_output
from loratools.receipt import Receipt


@reads
def resize(
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    size: str | int | None = None,
    dtype: str | None = None,
    format: str | None = None,
    sha256: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    **reading: Unpack[Reading],
) -> dict[str, Any]:
    """Write an adapter at other ranks; returns the receipt.

    Exactly one of `rank` (every module's, smaller or greater), `energy` (the share of each ‖ΔW‖² to keep), `max_error` (of each
    ‖ΔW‖) and `size` (bytes of the file of weights, as in "40MB"; the least total error over all modules, none below rank 1).
    Factors keep their dtype unless `dtype` names another; the error is of the factors as stored, `optimal_error` the least at
    that rank. A DoRA's direction is resized and its magnitude kept: the errors are then of ΔV. Raises OptionError,
    NonFiniteError, MatchError for an adapter without low-rank modules, NotExpressible.

    >>> receipt = resize("adapter/", "smaller/", rank=16)  # doctest: +SKIP
    >>> max(row["error"] / row["optimal_error"] for row in receipt["tensors"])  # doctest: +SKIP
    1.0000001
    """
    words = arguments(locals(), "adapter", "out")
    policy = Policy.checked(rank=rank, energy=energy, max_error=max_error, size=size, dtype=dtype)
    if threads is not None and threads < 1:
        raise UsageError("--threads", found=threads, expected="at least 1")
    target = check_output(out, overwrite=overwrite, inputs=paths(reading, [adapter]))
    source = loaded(adapter, read_options(reading))
    receipt = Receipt("resize", {"adapter": label(adapter), "out": str(out), **words})
    written = format_of(format, source)
    lows = _lows(source)
    try:
        with workers.single_threaded_blas():
            made = _made(source, lows, policy, written, threads or workers.default_threads())
    except LoratoolsError as error:
        raise error.at(file=source.path) from None
    deltas = _with_biases(source, {name: with_low(delta, made[name].delta) if name in made else delta for name, delta in source.items()})
    receipt.tensors = _rows(source, lows, made)
    receipt.expected = receipt.applied = len(deltas)
    receipt.notes = [*source.notes, *_notes(source)]
    return write(receipt, replace(source, deltas=deltas), [source], target, written, sha256=sha256)


def _lows(source: Adapter) -> dict[str, LowRank]:
    """The LoRA of every delta that has one."""
    found: dict[str, LowRank] = {}
    faults: list[LoratoolsError] = []
    for name, delta in source.items():
        try:
            low = low_of(delta)
        except LoratoolsError as error:
            faults.append(error.at(file=source.path, tensor=name))
            continue
        found |= {name: low} if low else {}
    raise_all(faults)
    if not found:
        raise MatchError(
            "no low-rank module to resize", file=source.path, found=", ".join(sorted({delta.kind for delta in source.values()}))
        )
    return found


def _made(source: Adapter, lows: Mapping[str, LowRank], policy: Policy, format: str, count: int) -> dict[str, Factored]:
    """Every module's new factors."""

    def encoded(planned: Mapping[str, LowRank]) -> Container:
        deltas = {name: with_low(delta, planned[name]) if name in planned else delta for name, delta in source.items()}
        return encode(replace(source, deltas=following(source, deltas)), format)

    if policy.size is not None:
        sigma2 = _each(squares, lows, count)
        ranks = ranks_within(policy.size, lows, sigma2, policy, encoded)
        return _each(lambda low, rank: resized(low, rank, policy.code), lows, count, ranks)
    if policy.rank is not None:
        return _each(lambda low: resized(low, policy.rank or 1, policy.code), lows, count)
    return _each(lambda low: reached(low, policy.limit or 0.0, policy.code), lows, count)


def _each(work: Callable[..., Any], lows: Mapping[str, LowRank], count: int, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`work` on every module, on a few threads; its error says the tensor."""
    done: dict[str, Any] = {}

    def one(name: str) -> None:
        try:
            done[name] = work(lows[name], *([more[name]] if more else []))
        except LoratoolsError as error:
            raise error.at(tensor=name) from None

    workers.run_all([partial(one, name) for name in lows], count)
    return {name: done[name] for name in lows}


def _with_biases(source: Mapping[str, Delta], deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """The deltas with every bias difference worth what it was, whatever the scaling of its module is now."""
    after = dict(deltas)
    for name, delta in source.items():
        low = bias_of(name, deltas) if isinstance(delta, Full) else None
        if isinstance(delta, Full) and low is not None:
            after[name] = scaled_to(delta, low.scaling)[0]  # by a power of two, for float16, or not at all
    return after


def _rows(source: Mapping[str, Delta], lows: Mapping[str, LowRank], made: Mapping[str, Factored]) -> list[dict[str, Any]]:
    rows = []
    for (name, found), share in zip(made.items(), shares([found.norm for found in made.values()]), strict=True):
        error, optimal = (found.error / found.norm, found.optimal / found.norm) if found.norm else (0.0, 0.0)
        rows.append({
            "name": name, "kind": source[name].kind, "rank_before": lows[name].rank, "rank": found.delta.rank,
            "scaling": found.delta.scaling, "error": error, "optimal_error": optimal, "energy": max(0.0, 1 - error**2), "share": share,
        })  # fmt: skip
    return rows


def _notes(source: Mapping[str, Delta]) -> list[str]:
    kinds = Counter(delta.kind for delta in source.values())
    notes = []
    if kinds["dora"]:
        notes.append(
            f"{kinds['dora']} DoRA modules: their directions ΔV are resized and their magnitudes kept; the errors are of ΔV, what they "
            "mean to W' depends on the base"
        )
    return notes
