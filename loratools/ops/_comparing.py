"""Two deltas of one tensor beside each other: through their factors where they are small products, else block by block."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from loratools.changes import Changes
from loratools.compress import as_low, known_of
from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled
from loratools.deltas.lowrank import LowRank
from loratools.errors import UnsupportedError
from loratools.refs import Ref, Spec, same_bytes
from loratools.tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.linalg.product import Triple

Row = dict[str, Any]


def pair_row(one: Delta, other: Delta, weight: Ref | None) -> Row:
    """The row of a tensor that both change; `weight` is the base's, where there is one."""
    kinds = {"kind_a": one.kind, "kind_b": other.kind}
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        return kinds | stored_row(one.value, other.value)
    if isinstance(one, Full) and isinstance(other, Full):
        return kinds | stored_row(one.diff, other.diff, one.scale, other.scale)
    additive = isinstance(one, Additive) and isinstance(other, Additive)
    if not additive and weight is not None:
        return kinds | _on_weight(one, other, weight)
    if not additive and one.kind != other.kind:
        return kinds | {"reason": f"{one.called} beside {other.called}"}
    first, second = difference_of(one), difference_of(other)
    if first is None or second is None:
        open_ = isinstance(one, Unsettled) or isinstance(other, Unsettled)
        return kinds | {"reason": f"no measure for {one.called}" + (": how its weight lies only --base tells" if open_ else "")}
    shapes = [_matrix(delta) if first.flat or second.flat else delta.shape() for delta in (first, second)]
    if shapes[0] != shapes[1]:
        return kinds | {"reason": f"shapes differ: {list(shapes[0])} and {list(shapes[1])}"}
    row = kinds | _of_differences(first, second, shapes[0])
    if isinstance(one, DoRA) and isinstance(other, DoRA):
        row["magnitude_distance"] = stored_row(one.magnitude, other.magnitude)["relative_distance"]
    return row


def difference_of(delta: Delta) -> Additive | None:
    """What of a delta is a difference: all of it, a DoRA's direction, what comes after a saved tensor; None if nothing is."""
    if isinstance(delta, DoRA):
        return delta.direction
    if isinstance(delta, Chain):
        return difference_of(delta.then) if not isinstance(delta.then, Full) else None
    return delta if isinstance(delta, Additive) else None


def norm_of(delta: Delta, weight: Ref | None) -> float | None:
    """‖applyᵢ(W) − W‖, or ‖ΔW‖ of what is a difference; None for what has no such norm, and for biases."""
    if isinstance(delta, Full):
        return None
    if weight is not None and not isinstance(delta, Additive):
        try:
            return math.sqrt(math.fsum(_inner(rows, rows) for rows in Changes([(delta, 1.0)], weight.spec, weight).one(0)))
        except UnsupportedError:
            return None
    found = difference_of(delta)
    if found is None:
        return None
    low = as_low(found, found.shape())
    return found.norm() if low is None else _norm(known_of([(low, 1.0)])[0])


def low_rank_row(one: LowRank, other: LowRank) -> Row:
    """Norms, cosine, distance, angles and overlaps of two LoRAs of one weight."""
    from loratools.linalg.angles import principal_angles
    from loratools.linalg.product import against

    (first, noise_a), (second, noise_b) = known_of([(one, 1.0)]), known_of([(other, 1.0)])
    met = against(first, *other.factors(), scale=other.scaling)
    columns = principal_angles(_span(first.U, first, noise_a), _span(second.U, second, noise_b))
    rows = principal_angles(_span(first.Vh.T, first, noise_a), _span(second.Vh.T, second, noise_b))
    return measures(_norm(first), _norm(second), met.inner, met.distance) | {
        "column_angles": columns.tolist(), "row_angles": rows.tolist(),
        "column_overlap": _overlap(columns), "row_overlap": _overlap(rows),
    }  # fmt: skip


def dense_row(changes: Changes) -> Row:
    """Norms, cosine and distance of two changes, block by block; their spaces are as good as everything, and not told."""
    sums = [math.fsum(column) for column in zip(*(_products(*changes(part)) for part in changes.parts()), strict=True)]
    norm_a, norm_b, distance = (math.sqrt(value) for value in (sums[0], sums[1], sums[3]))
    return measures(norm_a, norm_b, sums[2], distance) | {
        "column_angles": [], "row_angles": [], "column_overlap": None, "row_overlap": None,
    }  # fmt: skip


def measures(norm_a: float, norm_b: float, inner: float, distance: float) -> Row:
    return {
        "norm_a": norm_a, "norm_b": norm_b, "inner": inner, "cosine": cosine(inner, norm_a, norm_b), "distance": distance,
        "relative_distance": distance / norm_a if norm_a else None,
    }  # fmt: skip


def cosine(inner: float, norm_a: float, norm_b: float) -> float | None:
    """None where a norm is 0; rounding never takes it out of [-1, 1]."""
    return max(-1.0, min(1.0, inner / norm_a / norm_b)) if norm_a and norm_b else None


def stored_row(one: Ref, other: Ref, scale_a: float = 1.0, scale_b: float = 1.0) -> Row:
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


def _of_differences(one: Additive, other: Additive, shape: tuple[int, ...]) -> Row:
    lows = as_low(one, shape), as_low(other, shape)
    if lows[0] is not None and lows[1] is not None:
        return {"rank_a": lows[0].rank, "rank_b": lows[1].rank} | low_rank_row(lows[0], lows[1])
    return {"rank_a": None, "rank_b": None} | dense_row(Changes([(one, 1.0), (other, 1.0)], Spec("F32", shape), None))


def _matrix(delta: Additive) -> tuple[int, ...]:
    return Spec("F32", delta.shape()).matrix


def _on_weight(one: Delta, other: Delta, weight: Ref) -> Row:
    if len(weight.spec.shape) < 2:
        return {"reason": f"no measure for {one.called} of a vector"}
    try:
        changes = Changes([(one, 1.0), (other, 1.0)], weight.spec, weight)
    except UnsupportedError as error:
        return {"reason": str(error)}
    return {"rank_a": None, "rank_b": None} | dense_row(changes)


def _products(X: Tensor, Y: Tensor) -> tuple[float, float, float, float]:
    apart = X - Y
    return _inner(X, X), _inner(Y, Y), _inner(X, Y), _inner(apart, apart)


def _inner(X: Tensor, Y: Tensor) -> float:
    import torch

    return float(torch.dot(X.reshape(-1), Y.reshape(-1)))


def _span(vectors: Tensor, known: Triple, noise: float) -> Tensor:
    """The singular vectors that belong to ΔW: those whose singular value is no rounding."""
    return vectors[:, : int((noise < known.S).sum())]


def _norm(known: Triple) -> float:
    import torch

    return float(torch.linalg.vector_norm(known.S))


def _overlap(angles: Tensor) -> float | None:
    return float(angles.cos().square().mean()) if angles.numel() else None
