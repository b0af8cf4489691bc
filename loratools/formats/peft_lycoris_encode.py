"""LoHa and LoKr as peft lays them out: their ranks and alphas, and the one factor by which peft cuts every weight's sides.

Read from peft 0.21.2, `tuners/loha/layer.py` and `tuners/lokr/layer.py` (`factorization`, `update_layer`). A file that broke these
rules would have tensors of other shapes than the layers that peft makes for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from loratools.deltas.base import Delta
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats._scale import exact_alpha
from loratools.formats.peft_writing import Modules, Writing, Written, patterned, shortest
from loratools.refs import Ref

_REMEDY = "convert it first: --kind lora, or --format loratools keeps it"


def _alpha(alpha: float | None, scale: float, rank: int) -> float:
    """The alpha whose quotient by the rank is this scale: the one it has, where it is."""
    return shortest(alpha if alpha is not None and alpha / rank == scale else exact_alpha(scale, rank))


def _refused(fact: str, found: Any = None, expected: Any = None) -> NotExpressible:
    return NotExpressible(fact, found=found, expected=expected, remedy=_REMEDY)


def _core(core: Ref) -> Ref:
    """(r, r, k, 1) of a Conv1d, as peft has it, (r, r, h, w) of a Conv2d."""
    shape = core.spec.shape
    if len(shape) not in (3, 4):
        raise _refused("peft has no cores of such kernels", found=list(shape), expected="[r, r, k] or [r, r, h, w]")
    return core.reshape(*shape, 1) if len(shape) == 3 else core


def _loha(modules: Modules, stated: Mapping[str, Any]) -> Written:
    tensors: dict[str, Ref] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    cored = False
    faults: list[LoratoolsError] = []
    for path, leaves in modules.items():
        delta = leaves["weight"]
        assert isinstance(delta, LoHa)
        try:
            ranks[path] = _loha_rank(delta)
            alphas[path] = _alpha(delta.alpha, delta.scale, ranks[path])
            refs = {name: _core(ref) if name in ("t1", "t2") else ref for name, ref in delta.refs().items()}
            tensors |= {f"{path}.hada_{name}": ref for name, ref in refs.items()}
            cored = cored or delta.t1 is not None
        except LoratoolsError as error:
            faults.append(error.at(tensor=f"{path}.weight"))
    raise_all(faults)
    settings = patterned(ranks, "r", "rank_pattern") | patterned(alphas, "alpha", "alpha_pattern")
    return Written(tensors, settings | {"use_effective_conv2d": cored, "init_weights": True})


def _loha_rank(delta: LoHa) -> int:
    one, other = delta.w1_b.spec.shape[0], delta.w2_b.spec.shape[0]
    if one != other:
        raise _refused("peft's LoHa has one rank for both of its products", found=f"{one} and {other}")
    if (delta.t1 is None) != (delta.t2 is None):
        raise _refused("peft's LoHa has a core for both of its products or for none")
    return one


class _Cut(NamedTuple):
    """A Kronecker product's sides; where only their product with the kernel is known, `width` has the kernel within."""

    out: int
    width: int
    out2: int
    width2: int
    flat: bool

    def widths(self) -> Iterable[int]:
        """What w2's inputs may number, without the kernel."""
        return (size for size in range(self.width2, 0, -1) if self.width2 % size == 0) if self.flat else (self.width2,)


def _cut(delta: LoKr) -> _Cut:
    (out, width), (out2, width2, _) = delta.sides()
    return _Cut(out, width, out2, width2, flat=delta.w2 is None and delta.t2 is None)


def factorization(size: int, factor: int) -> tuple[int, int]:
    """How peft cuts a side in two: by the factor where that divides it, else near the square root, the first at most the factor.

    >>> factorization(256, -1), factorization(128, 4), factorization(12, 4), factorization(12, 5), factorization(127, -1)
    ((16, 16), (4, 32), (4, 3), (3, 4), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    first = max((one for one in range(1, math.isqrt(size) + 1) if size % one == 0 and one <= limit), default=1)
    return first, size // first


def _factor(cuts: Mapping[str, _Cut]) -> int:
    """The `decompose_factor` by which peft cuts all weights as they are. Raises NotExpressible, naming one that none fits."""
    sides = {(cut.out, cut.out2) for cut in cuts.values()} | {(cut.width, cut.width2) for cut in cuts.values() if not cut.flat}
    loose = {(cut.width, tuple(cut.widths())) for cut in cuts.values() if cut.flat}
    top = max((max(one) for one in (*sides, *((width, 1) for width, _ in loose))), default=1)
    most = max((first for first, _ in (*sides, *loose)), default=1)
    for matrices in (True, False):  # rather no kernel within the sides that may have one
        reach = [(one, sizes[:1] if matrices else sizes) for one, sizes in loose]
        for factor in (-1, most, *range(1, min(top, 2 * most) + 2)):
            whole = all(factorization(one * other, factor) == (one, other) for one, other in sides)
            if whole and all(any(factorization(one * size, factor) == (one, size) for size in sizes) for one, sizes in reach):
                return int(factor)
    path, cut = next(iter(cuts.items()))
    fact = "peft cuts all weights by one decompose_factor, and these are cut by none that it could be"
    raise _refused(fact, found=f"({cut.out}·{cut.out2}, {cut.width}·{cut.width2})").at(tensor=f"{path}.weight")


def _lokr(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = {path: _of(leaves["weight"]) for path, leaves in modules.items()}
    cuts = {path: _cut(delta) for path, delta in deltas.items()}
    factor = _factor(cuts)
    both = any(delta.w1 is None for delta in deltas.values())
    tensors: dict[str, Ref] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    faults: list[LoratoolsError] = []
    for path, delta in deltas.items():
        try:
            _check_kernel(delta)
            ranks[path] = _lokr_rank(delta, cuts[path], factor, both=both)
            alphas[path] = _alpha(delta.alpha, delta.scale, ranks[path])
            refs = {name: _core(ref) if name == "t2" else ref for name, ref in delta.refs().items()}
            tensors |= {f"{path}.lokr_{name}": ref for name, ref in refs.items()}
        except LoratoolsError as error:
            faults.append(error.at(tensor=f"{path}.weight"))
    raise_all(faults)
    settings = patterned(ranks, "r", "rank_pattern") | patterned(alphas, "alpha", "alpha_pattern")
    settings |= {"decompose_both": both, "decompose_factor": factor, "init_weights": True}
    return Written(tensors, settings | {"use_effective_conv2d": any(delta.t2 is not None for delta in deltas.values())})


def _of(delta: Delta) -> LoKr:
    assert isinstance(delta, LoKr)
    return delta


def _check_kernel(delta: LoKr) -> None:
    """A Conv1d's whole w2 has its indices before w1's in peft, a Conv2d's after; it has no LoKr of a Conv3d."""
    axes = 0 if delta.w2 is None else len(delta.w2.spec.shape)
    if axes > 4 or (axes == 3) != delta.exchanged:
        fact = "peft has the indices of a Conv1d's whole second factor before those of the first, of others after them"
        shape = [] if delta.w2 is None else list(delta.w2.spec.shape)
        raise _refused(fact if axes < 5 else "peft has no LoKr of a Conv3d", found=shape)


def _lokr_rank(delta: LoKr, cut: _Cut, factor: int, *, both: bool) -> int:
    """The rank by which peft makes whole the factors that are, and products those that are: a factor is whole from half its longer side."""
    sizes = [size for size in cut.widths() if factorization(cut.width * size, factor) == (cut.width, size)]
    first, second = max(cut.out, cut.width) / 2, max(cut.out2, max(sizes)) / 2
    found = {ref.spec.shape[0] for ref in (delta.w1_b, delta.w2_b) if ref is not None}
    if len(found) > 1:
        raise _refused("peft's LoKr has one rank for both of its factors", found=" and ".join(map(str, sorted(found))))
    least = math.ceil(max(1.0, second, first if both else 1.0))
    told = None if delta.alpha is None or not delta.scale else delta.alpha / delta.scale
    stated = int(told) if told is not None and told >= least and told == int(told) else least
    rank: int = next(iter(found), stated)
    for name, whole, wanted in (("w1", delta.w1, not (both and rank < first)), ("w2", delta.w2, rank >= second)):
        if (whole is not None) != wanted:
            spelt = "whole" if wanted else "a product"
            raise _refused(f"at this rank and size peft makes {name} {spelt}", found=f"rank {rank}")
    return rank


LOHA = Writing((LoHa,), _loha)
LOKR = Writing((LoKr,), _lokr)
