"""GLoRA and rotations in the suffixes of kohya's and LyCORIS' files, read and written.

lycoris-lora 4.1.3 `modules/glora.py`, `functional/diag_oft.py`, `functional/boft.py`; sd-scripts `networks/oft.py`, `networks/oft_flux.py`;
GLoRA's older layout by ComfyUI `comfy/weight_adapter/glora.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.compose import Chain, Part
from loratools.deltas.rotated import Rotated
from loratools.errors import AmbiguousError, FormatError, NotExpressible, ShapeError
from loratools.formats._module import Slots, check_tail, matrix
from loratools.formats._scalar import as_float32, number
from loratools.refs import Ref

_FLOOR = 1e-8  # added to a norm
OWN = "oft_unet_"  # how names begin in the files of sd-scripts' own networks of rotations


def glora(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    """a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in, …), and a core; in the older layout their transposes: a2·a1 and b2·b1."""
    names = ("a1", "a2", "b1", "b2")
    refs = [slots[f"{name}.weight"] for name in names]
    core = slots.get("bm.weight")
    older = core is None and _older(*refs)
    if older:  # of a kernel above 1 nothing tells what it did
        names, refs = ("a2", "a1", "b2", "b1"), [refs[1], refs[0], refs[3], refs[2]]
    for name, ref in zip(names if older or core is not None else names[:3], refs, strict=False):
        check_tail(ref, slots.keys[f"{name}.weight"])
    a1, a2, b1, b2 = refs
    scale = slots.alpha(a2.spec.shape[0], alpha)
    b2 = b2 if core is None else matrix(b2)
    return {"weight": Adjoined(a1=matrix(a1), a2=matrix(a2), b1=matrix(b1), b2=b2, alpha=scale, bm=core)}


def _older(a1: Ref, a2: Ref, b1: Ref, b2: Ref) -> bool:
    """Whether the factors meet in the older layout only, or in both where only there the rank is not above the weight's sides."""
    shapes = [ref.spec.shape for ref in (a1, a2, b1, b2)]
    if any(len(shape) < 2 for shape in shapes):
        return False
    (p, q), (q2, p2), (m, r), (r2, n) = (shape[:2] for shape in shapes)
    newer, older = (q, n, p) == (q2, p, p2) and r == r2 == q, (q, p, p, q) == (q2, p2, m, r) and n == p
    if newer and older and p == q:
        fact = "square factors: whether it is GLoRA of the older layout, with all of them transposed, is not to be seen"
        raise AmbiguousError(fact, found=f"a1 [{p}, {q}]", remedy="convert it with the program it was trained with")
    return older and (not newer or p < q)


def glora_slots(delta: Adjoined, alpha: Ref) -> dict[str, Ref]:
    """GLoRA in the newer layout."""
    kernel = len((delta.b2 if delta.bm is None else delta.bm).spec.shape) - 2
    pointed = {name: ref.reshape(*ref.spec.shape, *(1,) * kernel) for name, ref in delta.refs().items() if name not in ("b2", "bm")}
    rest = {"b2": delta.b2} if delta.bm is None else {"b2": delta.b2.reshape(*delta.b2.spec.shape, *(1,) * kernel), "bm": delta.bm}
    return {f"{name}.weight": ref for name, ref in (pointed | rest).items()} | {"alpha": alpha}


# -- rotations of the outputs


def rotations(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    """LyCORIS': blocks (n, b, b) once, (m, n, b, b) in turn; alpha times out bounds the norm of all their numbers as one."""
    numbers, told, scale = slots["oft_blocks"], slots.get("alpha"), slots.get("rescale")
    shape = numbers.spec.shape
    if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
        expected = "[blocks, b, b] or [factors, blocks, b, b]"
        raise ShapeError("no blocks of rotations", tensor=slots.keys["oft_blocks"], found=list(shape), expected=expected)
    constraint = 0.0 if told is None else slots.number("alpha")
    bound = constraint * (shape[-1] * shape[-3]) if constraint > 0 else None
    if len(shape) == 3:  # diag_oft.py contracts over the first axis of a rotation, which is its inverse; boft.py over the second
        return {"weight": Rotated(numbers=numbers, side="out", scale=scale, factor=-1.0, bound=bound, together=True, floor=_FLOOR)}
    return {"weight": Butterfly(numbers=numbers, side="out", scale=scale, halves=False, bound=bound, together=True, floor=_FLOOR)}


def rotation_slots(delta: Rotated | Butterfly) -> dict[str, Ref]:
    """LyCORIS' suffixes. Raises NotExpressible for what they do not say: rotations of the inputs, or made of numbers in another way."""
    own = delta.factor == -1 and not delta.shared if isinstance(delta, Rotated) else delta.factor == 1 and not delta.halves
    _check(delta, own=own)
    count = delta.extent()
    tensors = {"oft_blocks": delta.numbers, "alpha": number(0.0 if delta.bound is None else _constraint(delta.bound, count, 0.0))}
    return tensors | ({} if delta.scale is None else {"rescale": delta.scale})


def own_rotations(slots: Slots, alpha: float | None) -> Mapping[str, Delta]:
    """sd-scripts': `oft_blocks.0`, `.1`, … turn the weight's rows part by part, each with a bound of alpha times its rows.

    A norm above the bound becomes bound·(norm + 10⁻⁸)⁻¹ of itself, 10⁻⁸ added to the bound too; an alpha of 0 is a bound of 0.
    """
    places = sorted((int(slot.rpartition(".")[2]), slot) for slot in slots.refs if slot.startswith("oft_blocks."))
    constraint = slots.number("alpha")
    parts: list[Delta] = []
    for index, (place, slot) in enumerate(places):
        numbers = slots[slot]
        shape = numbers.spec.shape
        if len(shape) != 3 or shape[1] != shape[2] or place != index:
            expected = f"[blocks, b, b] of part {index}"
            raise ShapeError("no blocks of rotations", tensor=slots.keys[slot], found=list(shape), expected=expected)
        bound = constraint * (shape[0] * shape[1]) + _FLOOR
        parts.append(Rotated(numbers=numbers, side="out", factor=-1.0, bound=bound, together=True, floor=_FLOOR))
    if constraint < 0:
        raise FormatError("alpha is below 0", tensor=slots.keys["alpha"], found=constraint)
    return {"weight": parts[0] if len(parts) == 1 else _one_after_another(parts)}


def _one_after_another(parts: Iterable[Delta]) -> Delta:
    found: Delta | None = None
    start = 0
    for delta in parts:
        assert isinstance(delta, Rotated)
        part = Part(delta=delta, start=start, stop=start + delta.extent())
        found, start = part if found is None else Chain(first=found, then=part), part.stop
    assert found is not None
    return found


def own_slots(delta: Delta, *, indexed: bool) -> dict[str, Ref]:
    """sd-scripts' suffixes for a rotation, or rotations of the rows part by part, `indexed` as its network for Flux has them.

    Raises NotExpressible for any other delta.
    """
    parts = _parts(delta)
    alphas = {}
    for index, part in enumerate(parts):
        _check(part, own=part.factor == -1 and part.bound is not None and part.scale is None and not part.shared)
        alphas[index] = _constraint(part.bound or 0.0, part.extent(), _FLOOR)
    if len(set(alphas.values())) != 1:
        raise NotExpressible("sd-scripts' files say rotations of a weight's rows with one alpha, and nothing else", remedy="give --base")
    names = ["oft_blocks"] if len(parts) == 1 and not indexed else [f"oft_blocks.{index}" for index in range(len(parts))]
    return {name: part.numbers for name, part in zip(names, parts, strict=True)} | {"alpha": number(alphas[0])}


def _parts(delta: Delta) -> list[Rotated]:
    """A rotation of all rows, or those of parts that lie one behind another; an empty list for anything else."""
    if isinstance(delta, Rotated):
        return [delta]
    found: list[Part] = []
    while isinstance(delta, Chain) and isinstance(delta.then, Part):
        found.insert(0, delta.then)
        delta = delta.first
    if not found or not isinstance(delta, Part):
        return []
    found.insert(0, delta)
    starts = [sum(part.stop - part.start for part in found[:index]) for index in range(len(found))]
    rotated = [part.delta for part in found if isinstance(part.delta, Rotated)]
    return rotated if len(rotated) == len(found) and [part.start for part in found] == starts else []


def _check(delta: Rotated | Butterfly, *, own: bool) -> None:
    bounded = delta.bound is None or (delta.together and delta.floor == _FLOOR)
    if delta.side != "out" or not own or not bounded or delta.degree is not None or len(delta.numbers.spec.shape) < 3:
        fact = "these files turn a weight's outputs by whole blocks, and this turns its inputs" if delta.side == "in" else None
        raise NotExpressible(fact or "these files make rotations of their numbers in another way", remedy="convert it first: --kind lora")


def _constraint(bound: float, count: int, floor: float) -> float:
    """The alpha of which `bound` is made, the shortest there is: float32 where that gives it."""
    near = (bound - floor) / count
    candidates = (as_float32(near), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in candidates if alpha * count + floor == bound), near)
