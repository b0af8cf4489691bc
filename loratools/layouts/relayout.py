"""An adapter of a diffusion network under the names of its other side, by the table alone: no base is needed.

`relayout_of` plans it from names, `Relayout.apply` moves the deltas: cut where the authors' fused weight is several of diffusers',
stacked the other way (`deltas/cut.py`), the halves of an output norm swapped. All of it is exact, and bytes stay where factors do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from loratools.deltas.base import Delta
from loratools.errors import LoratoolsError, MatchError, NotExpressible, UnsupportedError, UsageError, raise_all
from loratools.layouts.naming import Named, naming_of
from loratools.layouts.networks import SIDES, TEXT, VERSION, networks
from loratools.layouts.roots import Roots, joined, split_root, split_word
from loratools.layouts.steps import Shape, Step, shape_of
from loratools.refs import Spec

_MOST_PARTS = 4  # of a fused weight


@dataclass(frozen=True)
class Relayout:
    """What becomes of an adapter's tensors under the names of `side`, as those of the networks in `titles`; `twins` have the names too."""

    side: str
    steps: tuple[Step, ...]
    titles: tuple[str, ...]
    twins: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many tensors have another name on this side, roots and dots aside."""
        return sum(name is not None for step in self.steps if step.pair is not None for name in step.names)

    def apply(self, deltas: Mapping[str, Delta]) -> dict[str, Delta]:
        """The same deltas under this side's names.

        Raises, all together: NotExpressible for kinds that cannot be cut or stacked, ShapeError for rows that are not in a fused weight's
        shares, AmbiguousError for what only the shape of a weight tells.
        """
        made: dict[str, Delta] = {}
        faults: list[LoratoolsError] = []
        for step in self.steps:
            try:
                made |= dict(step.made(deltas))
            except NotExpressible as error:
                faults.append(error.at(tensor=step.first))
            except UnsupportedError as error:
                remedy = error.remedy or "convert it first: --kind lora"
                faults.append(NotExpressible(error.fact, tensor=step.first, found=error.found, expected=error.expected, remedy=remedy))
            except LoratoolsError as error:
                faults.append(error.at(tensor=step.first))
        raise_all(faults)
        return made

    def said(self) -> str:
        """One sentence of what was renamed."""
        total = sum(name is not None for step in self.steps for name in step.names)
        now = sum(len(step.places) for step in self.steps)
        kept = "its names are this side's, but for roots and dots"
        renamed = f"{self.count} of {total} names are the other side's" if self.count else kept
        became = "" if now == total else f"; {total} tensors are {now} there"
        alike = f"; if it is of {' or '.join(self.twins)}, whose names are the same, say so with --network" if self.twins else ""
        return f"layout {self.side}: {renamed} ({', '.join(self.titles)}, diffusers {VERSION}){became}{alike}"


def relayout_of(
    names: Collection[str] | Mapping[str, Delta], side: str, *, flat: bool = False, base: Mapping[str, Spec] | None = None,
    network: str | None = None,
) -> Relayout:  # fmt: skip
    """How an adapter of these tensor names is called on a side, "diffusers" or "original" (BFL, mmdit, LDM, …).

    `flat` names have underscores for dots. What they leave open, a base that has the names tells, or the `network`, a word of the table,
    or the deltas' own shapes. Raises MatchError for names of no network in the table and for two that are one tensor there,
    AmbiguousError for names that two networks would call differently.
    """
    if side not in SIDES:
        raise UsageError("--layout", found=side, expected=" or ".join(SIDES))
    words = [found.name for found in networks() if found.name not in TEXT]
    if network not in (None, *words):
        raise UsageError("--network", found=network, expected=" or ".join(words))
    shapes = {name: shape for name, delta in names.items() if (shape := shape_of(delta))} if isinstance(names, Mapping) else {}
    base = base or {}
    groups: dict[tuple[str, str], dict[str, str]] = {}
    strange = []
    for name in names:
        found = split_word(name) if flat else split_root(name)
        if found is None:
            strange.append(name)
        else:
            groups.setdefault(found[:2], {})[found[2]] = name
    faults: list[LoratoolsError] = []
    named: dict[tuple[str, str], tuple[str, Mapping[str, Named]]] = {}
    twins: list[str] = []
    for (role, mine), rests in groups.items():
        there = [rest for other, root, rest in map(split_root, base) if (other, root) == (role, mine)] if not flat else []
        try:
            own = {rest: shapes[name] for rest, name in rests.items() if name in shapes}
            naming = naming_of(rests, "any" if not mine else role, side, flat=flat, base=there, network=network, shapes=own)
        except LoratoolsError as error:
            faults.append(_by_name(error, rests))
        else:
            named[role, mine] = naming.network.name, naming.named
            twins += naming.twins
    faults += [MatchError("a name that begins as no part of a pipeline does", tensor=name) for name in strange[:1]]
    raise_all(faults)
    roots = Roots(side, {key: network for key, (network, _) in named.items()}, alone=not flat and all(not mine for _, mine in groups))
    goals: dict[str, tuple[str, Named]] = {}
    for key, (_, tensors) in named.items():
        root = roots.of(*key)
        goals |= {groups[key][rest]: (root, tensor) for rest, tensor in tensors.items()}
    titles = dict.fromkeys(network for network, _ in named.values())
    return Relayout(side, tuple(_steps({name: goals[name] for name in names}, side, base)), tuple(titles), tuple(dict.fromkeys(twins)))


def _by_name(error: LoratoolsError, rests: Mapping[str, str]) -> LoratoolsError:
    error.tensor = rests.get(error.tensor or "", error.tensor)
    return error


def _steps(goals: Mapping[str, tuple[str, Named]], side: str, base: Mapping[str, Spec]) -> Iterator[Step]:
    """The steps in the order of the adapter's names. Raises MatchError for two names that are one tensor."""
    rows: dict[tuple[str, int], str] = {}  # by whose change a tensor, or a part of its rows, is changed; 0 is the first part
    for name, (root, tensor) in goals.items():
        places = tuple(joined(root, place) for place in _places(tensor, side))
        parts = [tensor.part] if tensor.pair is not None and side == "original" else list(range(_MOST_PARTS))
        for place in places:
            held = next((rows[place, part] for part in parts if (place, part) in rows), None)
            if held is not None:
                raise MatchError("two of the adapter's tensors are one under the other names", tensor=name, found=f"{held}, both {place}")
            rows |= {(place, part): name for part in parts}
    done: set[str] = set()
    for name, (root, tensor) in goals.items():
        pair, places = tensor.pair, tuple(joined(root, place) for place in _places(tensor, side))
        if pair is None:
            yield Step((name,), places)
        elif places[0] not in done:
            done.add(places[0])
            parts = [0] if side == "diffusers" else list(range(len(pair.diffusers)))
            yield Step(tuple(rows.get((places[0], part)) for part in parts), places, pair, *_weight(name, tensor, goals, base))


def _places(tensor: Named, side: str) -> tuple[str, ...]:
    if tensor.pair is None:
        return (tensor.name,)
    return tensor.pair.diffusers if side == "diffusers" else (tensor.pair.original,)


def _weight(name: str, tensor: Named, goals: Mapping[str, object], base: Mapping[str, Spec]) -> tuple[str | None, Shape]:
    own = name.removesuffix("bias") + "weight" if tensor.name.endswith(".bias") else name
    return (own if own in goals else None), (base[own].shape if own in base else None)
