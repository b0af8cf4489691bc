"""DEFT, PEANUT and OSF as peft has them: the inverse of what `peft_projections` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.deltas.networked import Networked
from loratools.deltas.projected import Projected
from loratools.deltas.subspace import Subspace
from loratools.formats._scale import exact_alpha
from loratools.formats.peft_writing import Modules, Writing, Written, alike, commonest, each, refused, shortest, weights
from loratools.refs import Ref


def _deft(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, Projected)
    settings = {
        "para": alike({path: delta.R is None for path, delta in deltas.items()}, "para"),
        "decomposition_method": alike({path: delta.method for path, delta in deltas.items()}, "decomposition_method"),
        "r": _rank(deltas), "alpha": _alpha(deltas, stated), "init_weights": True,
    }  # fmt: skip
    return Written(each(deltas, lambda delta: {"deft_P": delta.P} | ({} if delta.R is None else {"deft_R": delta.R})), settings)


def _rank(deltas: Mapping[str, Projected]) -> int:
    """The one r of which each module has as much as its outputs allow."""
    shapes = {path: delta.P.spec.shape for path, delta in deltas.items()}
    most = max(rank for _, rank in shapes.values())
    if all(rank == min(most, out) for out, rank in shapes.values()):
        return most
    return int(alike({path: rank for path, (_, rank) in shapes.items()}, "r"))


def _alpha(deltas: Mapping[str, Projected], stated: Mapping[str, Any]) -> float | None:
    """The alpha whose quotient by each rank is its scale; none, which peft takes for a scale of 1, where all are 1."""
    scales = {path: (delta.scale, delta.P.spec.shape[1]) for path, delta in deltas.items()}
    if all(scale == 1 for scale, _ in scales.values()):
        return None
    near = [exact_alpha(scale, rank) for scale, rank in scales.values()]
    told = stated.get("alpha")
    for alpha in (*([told] if isinstance(told, int | float) else []), *near):
        if alpha and all(alpha / rank == scale for scale, rank in scales.values()):
            return shortest(alpha)
    path = next(iter(deltas))
    raise refused("peft makes the scales of all modules of one alpha, and these are of none").at(tensor=f"{path}.weight")


def _peanut(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, Networked)
    settings = {
        "r": alike({path: delta.A.spec.shape[0] for path, delta in deltas.items()}, "r"),
        "depth": alike({path: len(delta.encoders) for path, delta in deltas.items()}, "depth"),
        "act_fn": alike({path: delta.activation for path, delta in deltas.items()}, "act_fn"),
        "scaling": shortest(alike({path: delta.scale for path, delta in deltas.items()}, "scaling")),
    }
    return Written(each(deltas, _peanut_slots), settings | {"init_weights": True})


def _peanut_slots(delta: Networked) -> dict[str, Ref]:
    inner = {f"peanut_{side}.{i}.weight": ref for side in ("encoders", "decoders") for i, ref in enumerate(getattr(delta, side))}
    return {"peanut_A.weight": delta.A, "peanut_B.weight": delta.B} | inner


def _osf(modules: Modules, stated: Mapping[str, Any]) -> Written:
    """How many singular values each module keeps, as a number; peft looks for the patterns of others anywhere in a path."""
    deltas = weights(modules, Subspace)
    kept = {path: delta.kept for path, delta in deltas.items()}
    common = commonest(kept.values(), 0)
    patterns = {f"^{re.escape(path)}$": count for path, count in sorted(kept.items()) if count != common}
    tensors = each(deltas, lambda delta: {f"osf_svd_params.{name}_low": delta.refs()[name] for name in "USV"})
    return Written(tensors, {"effective_rank": common, "rank_pattern": patterns, "init_weights": True})


DEFT = Writing((Projected,), _deft, leaves=("weight",))
PEANUT = Writing((Networked,), _peanut, leaves=("weight",))
OSF = Writing((Subspace,), _osf, leaves=("weight",))
