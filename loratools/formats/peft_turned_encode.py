"""(IA)³, OFT, BOFT and HRA as peft has them: numbers in peft's shapes, and the settings that all modules of an adapter share.

The inverse of what `peft_multiplicative` and `peft_rotations` read; peft 0.21.2, `tuners/ia3/`, `tuners/oft/`, `tuners/boft/`,
`tuners/hra/`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.reflected import Reflected
from loratools.deltas.rotated import Rotated
from loratools.deltas.scaled import Scaled
from loratools.formats._told import told_from
from loratools.formats.peft_writing import Modules, Writing, Written, alike, each, refused, weights
from loratools.refs import Ref, same_bytes

# -- (IA)³


def _ia3(modules: Modules, stated: Mapping[str, Any]) -> Written:
    tensors = each(modules, lambda leaves: {"ia3_l": _factors(leaves, known=bool(stated))})
    before = [path for path, leaves in modules.items() if getattr(leaves["weight"], "axis", 0) == 1]
    return Written(tensors, {"feedforward_modules": _listed(before, modules), "init_ia3_weights": True})


def _factors(leaves: Mapping[str, Delta], *, known: bool) -> Ref:
    """l as the factors themselves, (out, 1), (1, in), or a convolution's (1, n, 1…).

    What comes after the product takes the bias with it: it must be changed alike, unless the file was peft's own (`known`), whose base
    has then none.
    """
    weight, bias = leaves.get("weight"), leaves.get("bias")
    if not isinstance(weight, Scaled):
        raise refused("peft's (IA)³ changes no bias alone")
    same = isinstance(bias, Scaled) and bias.offset == weight.offset and _same(bias.l, weight.l)
    if weight.axis == 1 and bias is not None:
        raise refused("peft's (IA)³ of a layer's inputs leaves its bias as it is")
    if weight.axis == 0 and not same and (bias is not None or not known):
        raise refused("peft's (IA)³ of a layer's outputs multiplies its bias too, and this does not")
    l, shape = told_from(weight.l, weight.offset, 0.0, widest="F32"), weight.l.spec.shape  # noqa: E741
    count = l.spec.numel
    if len(shape) > 2:
        return l.reshape(1, count, *(1,) * (len(shape) - 2))
    return l.reshape(*((1, count) if weight.axis else (count, 1)))


def _same(one: Ref, other: Ref) -> bool:
    count = one.spec.numel
    return other.spec.numel == count and same_bytes(one.reshape(count), other.reshape(count))


def _listed(chosen: list[str], modules: Modules) -> list[str] | str:
    """Modules as peft selects them: by endings of their paths or, where another path ends alike, by a regular expression."""
    others = [path for path in modules if path not in chosen]
    if any(path.endswith(ending) for path in others for ending in chosen):
        return "|".join(re.escape(path) for path in sorted(chosen))
    return sorted(chosen)


# -- rotations of the inputs


def _oft(modules: Modules, stated: Mapping[str, Any]) -> Written:
    turned = weights(modules, Rotated)
    tensors = each(turned, lambda delta: {_oft_slot(delta): delta.numbers})
    series = {path: delta.degree is not None for path, delta in turned.items()}
    settings = {
        "block_share": alike({path: delta.shared for path, delta in turned.items()}, "block_share"),
        "coft": alike({path: delta.bound is not None for path, delta in turned.items()}, "coft"),
        "use_cayley_neumann": alike(series, "use_cayley_neumann"),
        "num_cayley_neumann_terms": alike({path: _terms(delta) for path, delta in turned.items()}, "num_cayley_neumann_terms"),
        "eps": _eps(turned, stated),
        "init_weights": True,
    }
    blocks = {path: delta.blocks() for path, delta in turned.items()}
    adjusted = None if any(delta.shared for delta in turned.values()) else _adjusted(blocks, stated)
    return Written(tensors, settings | (adjusted or _sizes(blocks, "r", "oft_block_size")))


def _adjusted(blocks: Mapping[str, tuple[int, int]], stated: Mapping[str, Any]) -> dict[str, int] | None:
    """The number or size of blocks to which the nearest divisors of all modules' inputs are theirs, where there is one."""
    most = max(count * size for count, size in blocks.values())
    for place, name in ((1, "oft_block_size"), (0, "r")):
        told = stated.get(name)
        for wanted in (*([told] if type(told) is int and told > 0 else []), *range(1, most + 1)):
            if all(divisor(count * size, wanted) == (count, size)[place] for count, size in blocks.values()):
                return {"r": 0, "oft_block_size": 0} | {name: wanted}
    return None


def _oft_slot(delta: Rotated) -> str:
    """The slot of a linear layer's or a convolution's numbers, or of an embedding's, which are turned the other way."""
    if delta.side != "in" or delta.scale is not None or delta.together or delta.floor or not delta.pointwise:
        raise refused("peft's OFT turns a layer's inputs, each block bounded by itself, and scales nothing")
    if len(delta.numbers.spec.shape) != 2 or abs(delta.factor) != 1:
        raise refused("peft's OFT has what stands above the diagonals of its blocks", found=list(delta.numbers.spec.shape))
    if delta.degree is not None and delta.last != (2.0 if delta.degree < 2 else 1.0):
        raise refused(f"a series that peft {'0.21.2'} sums otherwise", found=f"degree {delta.degree}, last {delta.last:g}")
    table = (delta.factor > 0) == (delta.degree is not None)
    return "oft_embedding_R.weight" if table else "oft_R.weight"


def _terms(delta: Rotated) -> int:
    return 5 if delta.degree is None else delta.degree + 1


def _eps(turned: Mapping[str, Rotated], stated: Mapping[str, Any]) -> float:
    """The eps whose quotient by the root of each module's number of blocks is its bound, to the last bit."""
    bounds = {path: (delta.bound, math.sqrt(delta.blocks()[0])) for path, delta in turned.items() if delta.bound is not None}
    if not bounds:
        return 6e-5
    path, (bound, root) = next(iter(bounds.items()))
    near = bound * root
    told = stated.get("eps")
    candidates = [*([float(told)] if isinstance(told, int | float) else []), near, math.nextafter(near, math.inf), math.nextafter(near, 0)]
    found = next((eps for eps in candidates if all(eps / root == bound for bound, root in bounds.values())), None)
    if found is None:
        raise refused("peft makes the bounds of all modules of one eps, and these are of none").at(tensor=f"{path}.weight")
    return found


def _sizes(blocks: Mapping[str, tuple[int, int]], number: str, size: str) -> dict[str, int]:
    """Blocks of one size for all modules, or else as many in each; the other setting is 0."""
    sizes, counts = {found for _, found in blocks.values()}, {count for count, _ in blocks.values()}
    if len(sizes) == 1:
        return {number: 0, size: sizes.pop()}
    if len(counts) == 1:
        return {number: counts.pop(), size: 0}
    return {number: 0, size: int(alike({path: found for path, (_, found) in blocks.items()}, size))}


def divisor(whole: int, wanted: int) -> int:
    """The divisor nearest to a wanted one, the smaller of two (`adjust_oft_parameters`).

    >>> divisor(24, 8), divisor(24, 9), divisor(24, 10), divisor(24, 99)
    (8, 8, 12, 24)
    """
    if wanted >= whole:
        return whole
    above = next(number for number in range(wanted, whole + 1) if whole % number == 0)
    below = next(number for number in range(wanted, 0, -1) if whole % number == 0)
    return below if wanted - below <= above - wanted else above


def _boft(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, Butterfly)
    tensors = each(deltas, _butterfly_slots)
    shapes = {path: delta.numbers.spec.shape for path, delta in deltas.items()}
    factors = alike({path: shape[0] for path, shape in shapes.items()}, "boft_n_butterfly_factor")
    sizes = _sizes({path: (shape[1], shape[2]) for path, shape in shapes.items()}, "boft_block_num", "boft_block_size")
    told = stated.get("boft_n_butterfly_factor")
    return Written(tensors, {"boft_n_butterfly_factor": told if factors == 1 and told else factors, "init_weights": True} | sizes)


def _butterfly_slots(delta: Butterfly) -> dict[str, Ref]:
    plain = delta.degree is None and delta.bound is None and delta.halves and delta.factor == 0.5
    if delta.side != "in" or not plain or delta.scale is None:
        raise refused("peft's BOFT turns a layer's inputs, half a block changing places at a time, and scales each row")
    count = delta.scale.spec.numel
    scale = delta.scale if len(delta.scale.spec.shape) == 2 else delta.scale.reshape(count, 1)
    return {"boft_R": delta.numbers, "boft_s": scale}


def _hra(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, Reflected)
    settings = {
        "r": alike({path: delta.U.spec.shape[1] for path, delta in deltas.items()}, "r"),
        "apply_GS": alike({path: delta.orthogonal for path, delta in deltas.items()}, "apply_GS"),
    }
    return Written(each(deltas, lambda delta: {"hra_u": delta.U}), settings | {"init_weights": True})


IA3 = Writing((Scaled,), _ia3)
OFT = Writing((Rotated,), _oft, leaves=("weight",))
BOFT = Writing((Butterfly,), _boft, leaves=("weight",))
HRA = Writing((Reflected,), _hra, leaves=("weight",))
