"""What the base says of two adapters: the intruder dimensions of each, and how much of each change lies in its leading directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratools.adapter import Adapter
from loratools.changes import Changes
from loratools.deltas.base import Delta
from loratools.errors import LoratoolsError, UnsupportedError
from loratools.ops._base import Base
from loratools.refs import Ref
from loratools.tensors import read_tensor

Row = dict[str, Any]
TOP_K, EPSILON = 10, 0.5  # peft's
SIDES = ("a", "b")


def intruders(
    base: Base, adapters: Sequence[Adapter], top_k: int, epsilon: float, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """For each adapter and each matrix it changes, one at a time: both SVDs whole, in float64. `progress` is told bytes of the base.

    Raises what an SVD raises, with the tensor's name.
    """
    names = [name for name in dict.fromkeys(name for one in adapters for name in one) if _measurable(base, name)]
    sizes = {name: base.weight(name).spec.nbytes for name in names}
    rows: list[Row] = []
    done = 0
    for name in names:
        held = {side: one[name] for side, one in zip(SIDES, adapters, strict=True) if name in one}
        try:
            rows += _rows(name, base.weight(name), held, top_k, epsilon)
        except LoratoolsError as error:
            raise error.at(file=base.checkpoint.path, tensor=name) from None
        done += sizes[name]
        if progress:
            progress(done, sum(sizes.values()))
    return {"top_k": top_k, "epsilon": epsilon, **{side: _total(rows, side) for side in SIDES}, "modules": rows}


def _measurable(base: Base, name: str) -> bool:
    return name in base and len(base.weight(name).spec.shape) > 1 and base.weight(name).spec.floating


def _rows(name: str, weight: Ref, deltas: Mapping[str, Delta], top_k: int, epsilon: float) -> list[Row]:
    import torch

    from loratools.linalg.intruders import Directions

    shape = weight.spec.matrix
    changed = {side: _dense(delta, weight) for side, delta in deltas.items()}
    if all(D is None for D in changed.values()):
        return []
    W = Directions(read_tensor(weight, torch.float64).reshape(shape))
    rows = []
    for side, D in changed.items():
        if D is None:
            continue
        found = W.against(D.reshape(shape), top_k)
        count = min(top_k, *shape)
        rows.append({
            "name": name, "adapter": side, "intruders": int((found.cosines < epsilon).sum()), "cosines": found.cosines.tolist(),
            "norm": found.norm, "left_energy": found.left, "right_energy": found.right,
            "left_chance": count / shape[0], "right_chance": count / shape[1],
        })  # fmt: skip
    return rows


def _dense(delta: Delta, weight: Ref) -> Any:
    """applyᵢ(W) − W whole; None for a delta that makes a tensor of another shape."""
    import torch

    try:
        changes = Changes([(delta, 1.0)], weight.spec, weight)
    except UnsupportedError:
        return None
    return torch.cat([rows.clone() for rows in changes.one(0)])


def _total(rows: Sequence[Row], side: str) -> Row:
    """Of one adapter: intruders, the modules that have one, and the energies of all its changes together."""
    own = [row for row in rows if row["adapter"] == side]
    whole = math.fsum(row["norm"] ** 2 for row in own)
    energies = {
        f"{place}_{what}": math.fsum(row["norm"] ** 2 * (row[f"{place}_{what}"] or 0.0) for row in own) / whole if whole else None
        for place in ("left", "right")
        for what in ("energy", "chance")
    }
    return {
        "modules": len(own), "with_intruders": sum(row["intruders"] > 0 for row in own), "intruders": sum(row["intruders"] for row in own),
        **energies,
    }  # fmt: skip
