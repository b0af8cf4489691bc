"""One adapter in numbers: what inspect tells of its modules, with norms of every kind and their share of the base's weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.compress import as_low, known_of
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.deltas.terms import term
from loratools.effect import Effect
from loratools.errors import LoratoolsError
from loratools.formats.reading import Reading
from loratools.ops._base import Base
from loratools.ops._beside import change_norm
from loratools.ops.inspect import inspect
from loratools.receipt import adapter_history
from loratools.refs import Ref, Spec

TOP = 32  # singular values of a module that a page shows
SMALL = 1 << 22  # elements of a change without factors up to which it is decomposed as a whole

Row = dict[str, Any]
Told = Callable[[int], None]  # is told how many bytes were done


def measured(path: str | Path, adapter: Adapter, on: Base | None, reading: Reading, told: Told) -> Row:
    """An adapter's facts, its warnings, its receipts, and a row for each module; `adapter` is under the base's names if there is one.

    A row has inspect's fields, `norm` (‖W′ − W‖; without a base ‖ΔW‖, of a DoRA its direction's), `weight` (‖W‖), `share` (their
    quotient), `sigma` (the TOP largest singular values of ΔW, of a DoRA its direction's), `sigmas` (how many there are), `why`
    (what kept a norm from being taken) and `unseen` (what kept the singular values from it).
    """
    done = 0

    def read(so_far: int, _: int) -> None:
        nonlocal done
        told(so_far - done)
        done = so_far

    found = inspect(path, base=None if on is None else on.checkpoint.path, spectra=True, progress=read, **reading)
    written: dict[str, Row] = {}
    receipts = adapter_history(adapter)
    for row in receipts[-1].get("tensors", ()) if receipts else ():
        written[str(row.get("name"))] = row
    told(found["bytes"])
    for row in found["modules"]:
        delta = adapter[row["name"]]
        weight = on.weight(row["name"]) if on is not None and row["name"] in on else None
        row |= _measures(row, delta, weight)
        row |= {word: written.get(row["name"], {}).get(word) for word in ("error", "optimal_error")}
    return found | {"notes": list(adapter.notes), "receipts": receipts}


def touched(adapter: Adapter, on: Base | None) -> int:
    """Bytes of the base's weights that it changes, each of which is read."""
    return sum(on.weight(name).spec.nbytes for name in adapter if name in on) if on is not None else 0


def _measures(row: Mapping[str, Any], delta: Delta, weight: Ref | None) -> Row:
    out: Row = {"sigmas": 0, "why": None, "unseen": None, "direction": isinstance(delta, DoRA | Chain)}
    out |= {"weight": row.get("weight_norm"), "share": row.get("relative_norm")}
    try:
        norm, sigma, effective = row.get("change_norm"), row["sigma"], row["effective_rank"]
        if "change_norm" not in row:
            norm = change_norm(delta, None, row)
        if sigma is None and isinstance(delta, Additive) and not isinstance(delta, Full | LowRank):
            sigma, effective = _spectrum(delta, weight)
        out |= {"norm": norm, "effective_rank": effective}
        if sigma is not None:
            out |= {"sigma": sigma[:TOP], "sigmas": len(sigma)}
        else:
            out["unseen"] = _unseen(row, delta)
        if norm is None:
            out["why"] = _why(row, delta, weight)
    except LoratoolsError as error:
        out |= {"norm": None, "sigma": None, "effective_rank": None, "sigmas": 0, "why": str(error)}
    return {**out, **{word: None for word, value in out.items() if isinstance(value, float) and not math.isfinite(value)}}


def _spectrum(delta: Additive, weight: Ref | None) -> tuple[list[float] | None, float | None]:
    """Singular values and effective rank of a difference that is no LoRA; None where only a large dense matrix has them."""
    from loratools.linalg.product import effective_rank
    from loratools.linalg.spectrum import spectrum

    shape = delta.shape() if weight is None else weight.spec.shape
    low = as_low(delta, shape)
    if low is not None:
        values = known_of([(low, 1.0)])[0].S
        return values.tolist(), effective_rank(values)
    if len(shape) < 2 or math.prod(shape) > SMALL:
        return None, None
    change = Effect(delta=delta, spec=Spec("F32", shape), weight=weight).change().D
    values = spectrum(change, top=min(change.shape))[0]
    return values.tolist(), effective_rank(values)


def _why(row: Mapping[str, Any], delta: Delta, weight: Ref | None) -> str:
    if isinstance(delta, Additive):
        return "its values are not all finite"
    if weight is None:
        return f"what {term(row['kind'])} changes depends on the base, which --base gives"
    return f"no measure for {term(row['kind'])}"


def _unseen(row: Mapping[str, Any], delta: Delta) -> str:
    size = math.prod(row["shape"])
    if len(row["shape"]) < 2 and row["shape"]:
        return "a vector has no singular values"
    if isinstance(delta, Full | Replacement):
        return "a tensor that is stored whole is not decomposed"
    if not isinstance(delta, Additive):
        return f"what {term(row['kind'])} changes is no difference of its own, and is not decomposed"
    if size > SMALL:
        return f"the change has no factors, and its {size:,} elements are more than the {SMALL:,} that are decomposed whole"
    return "its values are not all finite"
