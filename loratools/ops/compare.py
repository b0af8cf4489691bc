"""compare: two adapters module by module, as changes of the weight: nothing of size m × n is made.

Factors alone tell nothing, as B·A = (B·M)·(M⁻¹·A) for every M. So cosine and distance are those of the ΔWs, and the subspaces are
the spans of their singular vectors: of the columns what a module writes, of the rows what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import threads as workers
from loratools.adapter import Adapter
from loratools.compress import known_of
from loratools.deltas.base import Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, OptionError
from loratools.ops._algebra import label, loaded, low_of
from loratools.tensorfile import Ref, same_bytes
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.product import Triple

Row = dict[str, Any]


def compare(
    a: str | Path | Adapter, b: str | Path | Adapter, *, alpha_in: float | None = None, threads: int | None = None
) -> dict[str, Any]:
    """How far two adapters are apart, per module and in total, as a dictionary of plain values.

    `modules` has a row for each tensor that both change low-rank: ‖ΔW‖ of each, their cosine and distance, the principal angles
    (radians, rising) between the column and between the row spaces, and the overlaps, the mean of cos² of these angles (Hu et al.
    2021, section 7.2: 1 where one space holds the other, 0 where they are orthogonal). `others` has biases and saved tensors,
    `only_a` and `only_b` what one alone has, `incomparable` what has no common measure, with the reason. `total` counts a module
    that one lacks as a change of 0 there. Of a DoRA the directions ΔV are compared, and the magnitudes' distance is told.

    >>> compare("adapter/", "adapter/")["total"]["cosine"]  # doctest: +SKIP
    1.0
    """
    if threads is not None and threads < 1:
        raise OptionError("--threads", found=threads, expected="at least 1")
    one, other = loaded(a, alpha_in), loaded(b, alpha_in)
    found: dict[str, Row] = {}
    alone: dict[str, float] = {}
    names = [*one, *(name for name in other if name not in one)]
    with workers.single_threaded_blas():
        workers.run_all([partial(_one, name, one, other, found, alone) for name in names], threads or workers.default_threads())
    rows = [found[name] for name in names if name in found]
    modules = [row for row in rows if "cosine" in row]
    return {
        "a": label(a), "b": label(b), "total": _total(modules, one, other, alone), "modules": modules,
        "others": [row for row in rows if "equal" in row], "incomparable": [row for row in rows if "reason" in row],
        "only_a": [name for name in one if name not in other], "only_b": [name for name in other if name not in one],
        "notes": _notes(one, other),
    }  # fmt: skip


def _one(name: str, one: Adapter, other: Adapter, found: dict[str, Row], alone: dict[str, float]) -> None:
    try:
        if name in one and name in other:
            found[name] = {"name": name, **_pair(one[name], other[name])}
        else:
            low = low_of(one.get(name) or other[name])
            if low is not None:
                alone[name] = _norm(known_of([(low, 1.0)])[0])
    except LoratoolsError as error:
        raise error.at(file=(one if name in one else other).path, tensor=name) from None


def _pair(one: Delta, other: Delta) -> Row:
    """The row of a tensor that both change."""
    kinds = {"kind_a": one.kind, "kind_b": other.kind}
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return kinds | _dense(one.value, other.value)
    if isinstance(one, Full) and isinstance(other, Full):
        return kinds | _dense(one.diff, other.diff, one.scale, other.scale)
    if one.kind != other.kind:
        return kinds | {"reason": f"a {one.kind} beside a {other.kind}"}
    first, second = low_of(one), low_of(other)
    if first is None or second is None:
        return kinds | {"reason": f"no measure for a {one.kind}"}
    if first.shape() != second.shape():
        return kinds | {"reason": f"shapes differ: {list(first.shape())} and {list(second.shape())}"}
    row = kinds | {"rank_a": first.rank, "rank_b": second.rank} | low_rank_row(first, second)
    if isinstance(one, DoRA) and isinstance(other, DoRA):
        magnitudes = _dense(one.magnitude, other.magnitude)
        row["magnitude_distance"] = magnitudes["relative_distance"]
    return row


def low_rank_row(one: LowRank, other: LowRank) -> Row:
    """Norms, cosine, distance, angles and overlaps of two LoRAs of one weight."""
    from loratools.linalg.angles import principal_angles
    from loratools.linalg.product import against

    (first, noise_a), (second, noise_b) = known_of([(one, 1.0)]), known_of([(other, 1.0)])
    met = against(first, *other.factors(), scale=other.scaling)
    norm_a, norm_b = _norm(first), _norm(second)
    columns = principal_angles(_span(first.U, first, noise_a), _span(second.U, second, noise_b))
    rows = principal_angles(_span(first.Vh.T, first, noise_a), _span(second.Vh.T, second, noise_b))
    return {
        "norm_a": norm_a, "norm_b": norm_b, "inner": met.inner, "cosine": _cosine(met.inner, norm_a, norm_b),
        "distance": met.distance, "relative_distance": met.distance / norm_a if norm_a else None,
        "column_angles": columns.tolist(), "row_angles": rows.tolist(),
        "column_overlap": _overlap(columns), "row_overlap": _overlap(rows),
    }  # fmt: skip


def _span(vectors: Tensor, known: Triple, noise: float) -> Tensor:
    """The singular vectors that belong to ΔW: those whose singular value is no rounding."""
    return vectors[:, : int((noise < known.S).sum())]


def _norm(known: Triple) -> float:
    import torch

    return float(torch.linalg.vector_norm(known.S))


def _cosine(inner: float, norm_a: float, norm_b: float) -> float | None:
    """None where a norm is 0; rounding never takes it out of [-1, 1]."""
    return max(-1.0, min(1.0, inner / norm_a / norm_b)) if norm_a and norm_b else None


def _overlap(angles: Tensor) -> float | None:
    return float(angles.cos().square().mean()) if angles.numel() else None


def _dense(one: Ref, other: Ref, scale_a: float = 1.0, scale_b: float = 1.0) -> Row:
    """Two tensors that are stored whole: the same, or how far apart."""
    import torch

    if one.spec.shape != other.spec.shape:
        return {"reason": f"shapes differ: {list(one.spec.shape)} and {list(other.spec.shape)}"}
    if scale_a == scale_b and same_bytes(one, other):
        return {"equal": True, "relative_distance": 0.0}
    if not (one.spec.floating and other.spec.floating):
        return {"equal": False, "relative_distance": None}
    X, Y = scale_a * read_tensor(one, torch.float64), scale_b * read_tensor(other, torch.float64)
    norm, distance = float(torch.linalg.vector_norm(X)), float(torch.linalg.vector_norm(X - Y))
    return {"equal": distance == 0, "relative_distance": distance / norm if norm else None}


def _total(modules: list[Row], one: Mapping[str, Delta], other: Mapping[str, Delta], alone: Mapping[str, float]) -> Row:
    """All modules as one vector; a module that one adapter lacks is zero there."""
    only = [math.fsum(norm**2 for name, norm in alone.items() if name in side) for side in (one, other)]
    norm_a, norm_b = (
        math.sqrt(math.fsum(row[key] ** 2 for row in modules) + more) for key, more in zip(("norm_a", "norm_b"), only, strict=True)
    )
    distance = math.sqrt(math.fsum(row["distance"] ** 2 for row in modules) + sum(only))
    return {
        "modules": len(modules), "norm_a": norm_a, "norm_b": norm_b,
        "cosine": _cosine(math.fsum(row["inner"] for row in modules), norm_a, norm_b), "distance": distance,
        "relative_distance": distance / norm_a if norm_a else None,
        "column_overlap": _mean([row["column_overlap"] for row in modules]), "row_overlap": _mean([row["row_overlap"] for row in modules]),
    }  # fmt: skip


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _notes(one: Adapter, other: Adapter) -> list[str]:
    notes = [*one.notes, *other.notes]
    if not set(one) & set(other):
        notes.append("no tensor is in both: are they adapters of one base, under the same names?")
    if any(isinstance(delta, DoRA) for delta in (*one.values(), *other.values())):
        notes.append("DoRA: the directions ΔV are compared; what W' makes of them depends on the base")
    return notes
