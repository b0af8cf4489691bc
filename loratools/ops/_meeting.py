"""Which deltas meet on a tensor, and by which way they are put together; what has no sum is told before any work is done.

    kept    alone at weight 1, or saved tensors of the same bytes: as it is
    whole   a saved tensor at another weight: W + w·(V − W), saved whole again
    full    differences stored whole, and any change of a vector: added (and pruned) element by element
    core    differences that are small products: through the core of their concatenated factors, exactly
    dense   everything else: Σ wᵢ·(applyᵢ(W) − W), or what a method makes of these changes, truncated
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from loratools.deltas.base import Additive, Delta
from loratools.deltas.compose import Chain
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import OnParameter
from loratools.errors import AmbiguousError, LoratoolsError, MatchError, OptionError, ShapeError, UnsupportedError, raise_all
from loratools.ops._combine_options import WAYS, Options
from loratools.refs import Ref, Spec, same_bytes


class Term(NamedTuple):
    """A delta, its weight, the place of its adapter among those given, and the file it is from."""

    delta: Delta
    weight: float
    order: int
    file: Path | None


Terms: TypeAlias = list[Term]
Base: TypeAlias = Callable[[str], Ref | None]  # the base's tensor of this name, if there are a base and a tensor


def routes(terms: Mapping[str, Terms], options: Options, base: Base) -> dict[str, str]:
    """The way of every tensor. Raises, all together, MatchError, ShapeError, UnsupportedError and OptionError for what has none.

    What could be kept because it is alone is still computed where the rest becomes LoRA: formats have one kind for all.
    """
    found: dict[str, str] = {}
    faults: list[LoratoolsError] = []
    for name, listed in terms.items():
        try:
            found[name] = _route(listed, options, base(name))
        except LoratoolsError as error:
            faults.append(error.at(file=listed[-1].file, tensor=name))
    if "core" in found.values() or "dense" in found.values():
        for name, way in found.items():
            delta = terms[name][0].delta
            if way == "kept" and not replaces(delta) and not isinstance(delta, Full):
                found[name] = "core" if isinstance(delta, Additive) else "dense" if base(name) is not None else "kept"
    needing = [name for name, way in found.items() if way == "dense" and not options.chosen and not _additive(terms[name])]
    faults += [rank_needed().at(file=terms[name][-1].file, tensor=name) for name in needing]
    raise_all(faults)
    return found


def rank_needed() -> OptionError:
    return OptionError("this change has no small factors, so it takes a rank to write it as LoRA", expected=WAYS)


def replaces(delta: Delta) -> bool:
    """Whether nothing of the base's own tensor is left."""
    return isinstance(delta, Replacement) or (isinstance(delta, Chain) and replaces(delta.first))


def _route(terms: Terms, options: Options, weight: Ref | None) -> str:
    based = weight is not None
    alone = len(terms) == 1 and terms[0].weight == 1
    if all(isinstance(term.delta, Replacement) for term in terms):
        return _saved(terms, based)
    if any(replaces(term.delta) for term in terms):
        if alone or (len(terms) == 1 and based):
            return "kept" if alone else "whole"
        if len(terms) == 1:
            raise _only_at_1(terms)
        fact = "several adapters change this tensor, and one saves it whole"
        raise MatchError(fact, found=_kinds(terms), remedy="remove it from all but one")
    _check_shapes(terms)
    if all(isinstance(term.delta, Full) for term in terms):
        return "full"
    if not _additive(terms):
        if not options.sparse and alone:
            return "kept"
        if weight is None:
            raise _needs_base(terms)
        return "full" if len(weight.spec.shape) < 2 else "dense"
    if options.sparse:
        return "dense"
    return "kept" if alone and not isinstance(terms[0].delta, LowRank) else "core"


def _saved(terms: Terms, based: bool) -> str:
    """A saved tensor takes the weight's place: W + Σ wᵢ(V − W) is V where the weights sum to 1, and needs the base elsewhere."""
    values = [term.delta.value for term in terms if isinstance(term.delta, Replacement)]
    if not all(same_bytes(values[0], other) for other in values[1:]):
        raise MatchError("several adapters save this tensor whole, and not the same", remedy="remove it from all but one")
    weights = [term.weight for term in terms]
    if sum(weights) == 1 or all(weight == 1 for weight in weights):
        return "kept"
    if len(terms) == 1 and based:
        return "whole"
    raise _only_at_1(terms)


def _only_at_1(terms: Terms) -> UnsupportedError:
    remedy = "--base tells what another weight makes of it" if len(terms) == 1 else "give it to one of them, at a weight of its own"
    return UnsupportedError("a tensor saved whole has weight 1", found=", ".join(f"{term.weight:g}" for term in terms), remedy=remedy)


def _needs_base(terms: Terms) -> UnsupportedError:
    called = next(term.delta.called for term in terms if not isinstance(term.delta, Additive))
    if any(isinstance(term.delta, Unsettled | WherePresent | OnParameter) for term in terms):
        return UnsupportedError(f"how the weight of {called} delta lies, and its shape, only the base tells", remedy="give --base")
    fact = f"{called} delta is no difference that could be scaled, pruned or summed: W' depends on the base"
    return UnsupportedError(fact, remedy=f"give --base, and {WAYS}")


def _check_shapes(terms: Terms) -> None:
    """Raise where the deltas cannot be of one weight: other shapes, or other layers."""
    known = [term.delta for term in terms if isinstance(term.delta, Additive)]
    flat = any(delta.flat for delta in known)
    shapes = list(dict.fromkeys(Spec("F32", delta.shape()).matrix if flat else delta.shape() for delta in known))
    if len(shapes) > 1:
        raise ShapeError("the adapters change weights of different shapes", found=list(shapes[1]), expected=list(shapes[0]))
    layers = {layer for term in terms if (layer := own_layer(term.delta)) is not None}
    if len(layers - {"unknown"}) > 1:
        raise MatchError("the adapters take this weight for different layers", found=", ".join(sorted(layers - {"unknown"})))
    if layers == {"transposed", "unknown"}:
        fact = "of one adapter it is known that this square weight is stored transposed, of another it is not known"
        raise AmbiguousError(fact, remedy="give --base, or --transposed GLOB for all")


def own_layer(delta: Delta) -> str | None:
    """What layer a delta says that its weight belongs to, if its kind says so."""
    if isinstance(delta, DoRA):
        return own_layer(delta.direction)
    if isinstance(delta, Chain):
        return own_layer(delta.then)
    return delta.layer if isinstance(delta, LowRank) else None


def _additive(terms: Sequence[Term]) -> bool:
    return all(isinstance(term.delta, Additive) for term in terms)


def _kinds(terms: Terms) -> str:
    return ", ".join(dict.fromkeys(term.delta.kind for term in terms))
