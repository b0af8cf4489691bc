"""Writing SAM-LoRA's files: the changes of a fused weight's queries and values, or of those that lie apart, block by block, at scale 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loratools.adapter import Adapter
from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.lowrank import LowRank
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats._derived import Derived, cells
from loratools.formats._refused import KEPT, RESIZE, passengers
from loratools.formats._scale import ALPHA, only
from loratools.formats.base import Container
from loratools.formats.samlora import APART, DECODER, FUSED, HEAD
from loratools.refs import Ref

_COUNTED = re.compile(r"(?P<root>block):(?P<block>\d+)\.weight")


def encode(adapter: Adapter) -> Container:
    """The adapter as such a file: changes of the queries and values of all blocks, at scale 1, and a head's weight.

    Raises NotExpressible for changes of keys and of other weights, other kinds, blocks that are missing or that have another rank.
    """
    faults = passengers(adapter, "these files have")
    blocks, tensors = _Blocks(), dict[str, Ref]()
    for name, delta in adapter.items():
        try:
            if not blocks.take(name, delta):
                tensors |= _whole(name, delta)
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all([*faults, *blocks.faults()])
    if not blocks.lows:
        fact = "these files are of a transformer's blocks, and none is changed"
        raise NotExpressible(fact, file=adapter.path, tensor=next(iter(adapter), None), remedy=KEPT)
    ranks = {blocks.names[index]: float(low.rank) for index, low in blocks.lows.items()}
    rank = only(ranks, "one rank holds for all of its blocks", RESIZE)
    for index, low in sorted(blocks.lows.items()):
        tensors |= {f"w_a_{index:03}": low.A, f"w_b_{index:03}": low.B}
    return Container(tensors, {ALPHA: repr(rank)})


@dataclass
class _Blocks:
    """Changes by the file's numbers, 2·block of queries and 2·block + 1 of values, and the tensors that they are of."""

    lows: dict[int, LowRank] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, delta: Delta) -> bool:
        """Whether it is one of a block's attention. Raises NotExpressible for those that these files cannot say."""
        match = FUSED.fullmatch(name) or _COUNTED.fullmatch(name) or APART.fullmatch(name)
        if match is None:
            return False
        self.roots.setdefault(match["root"], name)
        side, first = match.groupdict().get("side"), 2 * int(match["block"])
        low = _sayable(delta)
        made = _halves(low) if side is None else {"qv".index(side): low}
        self.lows |= {first + place: half for place, half in made.items()}
        self.names |= {first + place: name for place in made}
        return True

    def faults(self) -> list[LoratoolsError]:
        fact, remedy = "blocks of a second transformer", "write those of each to a file of its own"
        faults: list[LoratoolsError] = [NotExpressible(fact, tensor=name, remedy=remedy) for name in list(self.roots.values())[1:]]
        gap = next((index for index in range((max(self.lows, default=-1) + 2) // 2 * 2) if index not in self.lows), None)
        if self.lows and gap is not None:
            near = min(self.lows, key=lambda index: abs(index - gap))
            fact, found = "queries and values of all blocks are counted, and one has no change", f"no {('queries', 'values')[gap % 2]}"
            remedy = "--format peft names each"
            faults.append(NotExpressible(fact, tensor=self.names[near], found=f"{found} of block {gap // 2}", remedy=remedy))
        return faults


def _sayable(delta: Delta) -> LowRank:
    if not isinstance(delta, LowRank):
        raise NotExpressible(f"these files cannot say {delta.called} delta", remedy="convert it first: --kind lora")
    if delta.layer in ("embedding", "transposed") or len(delta.A.spec.shape) != 2:
        raise NotExpressible("no matrix stored (out, in), as queries and values are", found=list(delta.shape()), remedy=KEPT)
    if delta.scaling != 1:
        remedy = "rescale --bake makes it 1"
        raise NotExpressible("these files have no alpha, and Sam_LoRA's scale is 1", found=delta.scaling, remedy=remedy)
    return delta


def _halves(low: LowRank) -> dict[int, LowRank]:
    """A change of a fused weight as those of its queries, 0, and its values, 1, whose keys it leaves alone."""
    rows, rank = low.B.spec.shape
    if rows != 3 * low.A.spec.shape[1]:
        found, remedy = [rows, low.A.spec.shape[1]], "is it of another model? --format peft has LoRA on any"
        raise NotExpressible("no fused query, key and value", found=found, expected="[3·dim, dim]", remedy=remedy)
    held = cells(low.B).reshape(3, rows // 3, rank)
    if held[1].tobytes().strip(b"\0"):
        raise NotExpressible("it changes the keys too, and these files have queries and values alone", remedy="--format peft has all three")
    half = rank // 2
    apart = rank % 2 == 0 and not (held[0, :, half:].tobytes() + held[2, :, :half].tobytes()).strip(b"\0")
    made = {}
    for place, slot in enumerate((0, 2)):
        columns = slice(0, rank) if not apart else slice(0, half) if slot == 0 else slice(half, rank)
        A, B = _some_rows(low.A, columns), _some_columns(low.B, slot, columns)
        made[place] = LowRank(A=A, B=B, alpha=float(A.spec.shape[0]), layer="linear")
    return made


def _some_rows(A: Ref, rows: slice) -> Ref:
    return Derived(A, (rows.stop - rows.start, A.spec.shape[1]), lambda found: found[rows])


def _some_columns(B: Ref, slot: int, columns: slice) -> Ref:
    """Columns of one slot's rows."""
    dim, rank = B.spec.shape[0] // 3, B.spec.shape[1]
    return Derived(B, (dim, columns.stop - columns.start), lambda found: found.reshape(3, dim, rank)[slot, :, columns])


def _whole(name: str, delta: Delta) -> Mapping[str, Ref]:
    if not isinstance(delta, Replacement):
        remedy = "convert --base gives it the model's names" if ":" in name else "--format peft or loratools has the others"
        fact, expected = "these files change the queries and values of blocks", "….blocks.N.attn.qkv.weight"
        raise NotExpressible(fact, expected=expected, remedy=remedy)
    shape = delta.value.spec.shape
    if name in (HEAD, "fc.weight") and len(shape) == 2:
        return {f"fc_{shape[1]}in_{shape[0]}out": delta.value}
    if name.startswith(DECODER):
        return {name: delta.value}
    remedy = "--format loratools has any"
    raise NotExpressible("these files have a head's weight and SAM's decoder alone as whole tensors", remedy=remedy)
