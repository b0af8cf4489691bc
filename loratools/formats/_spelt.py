"""Changes in the suffixes that kohya's, LyCORIS' and ComfyUI's files share: what `_slots` reads, written; factors keep their bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from loratools.adapter import Adapter
from loratools.deltas.adjoined import Adjoined
from loratools.deltas.base import Additive, Delta
from loratools.deltas.butterfly import Butterfly
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full, Replacement
from loratools.deltas.laid import Unsettled, WherePresent
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lowrank import LowRank
from loratools.deltas.padded import Padded
from loratools.deltas.rotated import Rotated
from loratools.deltas.scaled import Scaled
from loratools.deltas.tucker import Tucker
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats._refused import KEPT
from loratools.formats._scalar import number
from loratools.formats._scale import exact_alpha
from loratools.formats._told import told_from
from loratools.formats._turned import glora_slots, rotation_slots
from loratools.refs import InMemory, Ref, Spec

_REMEDY = "convert it first: --kind lora, or --kind dense"
_FAMILY = ("kohya", "comfyui")


def spelt_tensors(
    adapter: Adapter, named: Callable[[str], str], lacking: Mapping[type[Delta], str], own: Callable[[str, Delta], dict[str, Ref] | None]
) -> dict[str, Ref]:
    """The adapter's tensors by key; `named` tells how the format spells a module, `lacking` which kinds it has not, and who has.

    `own` may give the suffixes of a module that the format spells in a way of its own, or refuse it.

    Raises NotExpressible, all together, for what these suffixes cannot say.
    """
    faults = orientation(adapter)
    tensors: dict[str, Ref] = {}
    for name, delta in adapter.items():
        module, _, leaf = name.rpartition(".")
        beside = adapter.get(f"{module}.weight")
        try:
            word = named(module)
            found = own(word, delta)
            if found is None:
                found = _slots(leaf, delta, lacking, norm=isinstance(beside, Full) and len(beside.diff.spec.shape) == 1)
            met = [suffix for suffix in found if f"{word}.{suffix}" in tensors]
            if met:
                remedy = "--format comfyui or diffusers keeps the dots"
                raise NotExpressible("another module's name is spelt alike", found=f"{word}.{met[0]}", remedy=remedy)
            tensors |= {f"{word}.{suffix}": ref for suffix, ref in found.items()}
        except LoratoolsError as error:
            faults.append(error.at(tensor=name))
    raise_all(faults)
    return tensors


def orientation(adapter: Adapter) -> list[LoratoolsError]:
    """A fault where nothing has told yet which weights are stored (in, out), and some are."""
    if not adapter.metadata.get("peft", {}).get("fan_in_fan_out"):
        return []
    waiting = (name for name, delta in adapter.items() if isinstance(delta, Unsettled) or getattr(_inner(delta), "layer", "") == "unknown")
    fact = "whether its weight is stored transposed is not known yet"
    return [NotExpressible(fact, tensor=name, remedy="give the base with --base") for name in waiting]


def carried(adapter: Adapter) -> dict[str, str]:
    """The metadata of a file of this family."""
    return dict(adapter.metadata.get("safetensors", {})) if adapter.format in _FAMILY else {}


def alpha_of(low: LowRank) -> float:
    """The alpha that says a LoRA's scaling without a flag for rsLoRA."""
    return exact_alpha(low.scaling, low.rank) if low.rslora else low.alpha


def plain(delta: Full) -> Ref:
    """A whole difference. Raises NotExpressible for one under a factor."""
    if delta.scale != 1:
        remedy = "rescale --bake makes it 1"
        raise NotExpressible("a difference under a factor", found=delta.scale, expected="1", remedy=remedy)
    return delta.diff


def _inner(delta: Delta) -> Delta:
    return delta.direction if isinstance(delta, DoRA) else delta


def _slots(leaf: str, delta: Delta, lacking: Mapping[type[Delta], str], *, norm: bool) -> dict[str, Ref]:
    open_ = delta.delta if isinstance(delta, Unsettled | WherePresent) else delta
    for kind, who in lacking.items():
        if isinstance(open_, kind):
            raise NotExpressible(f"this format cannot say {open_.called} delta", remedy=who)
    if leaf == "bias" and isinstance(delta, Full):
        return {"b_norm" if norm else "diff_b": plain(delta)}
    if leaf != "weight":
        raise NotExpressible(f"{delta.called} delta of neither a weight nor a bias", remedy=KEPT)
    inner = delta.delta if isinstance(delta, Unsettled) and not delta.transposed else delta
    if isinstance(inner, DoRA):
        return _additive(inner.direction) | {"dora_scale": _magnitude(inner)}
    if isinstance(inner, Full) and norm:
        return {"w_norm": plain(inner)}
    if isinstance(inner, Padded):
        size = inner.size
        return _slots(leaf, inner.delta, lacking, norm=False) | {"reshape_weight": InMemory(Spec("I64", (len(size),)), pack(size))}
    if isinstance(inner, Adjoined):
        return glora_slots(inner, _nonzero(inner.alpha))
    if isinstance(inner, Rotated | Butterfly):
        return rotation_slots(inner)
    if isinstance(inner, Scaled):
        return {"weight": _scales(inner), "on_input": InMemory(Spec("I64", ()), pack((inner.axis,)))}
    if isinstance(inner, Replacement):
        return {"set_weight": inner.value}
    return _additive(inner)


def pack(values: tuple[int, ...]) -> bytes:
    """Whole numbers as int64."""
    return struct.pack(f"<{len(values)}q", *values)


def _scales(delta: Scaled) -> Ref:
    """l as LyCORIS has it, which multiplies by 1 + l; a vector for linear layers."""
    l = told_from(delta.l, delta.offset, 1.0)  # noqa: E741
    shape = l.spec.shape
    return l.reshape(l.spec.numel) if len(shape) == 2 else l.reshape(1, l.spec.numel, *shape[2:]) if len(shape) > 2 else l


def _additive(delta: Delta) -> dict[str, Ref]:
    if isinstance(delta, Full):
        return {"diff": plain(delta)}
    if isinstance(delta, LowRank) and delta.layer not in ("embedding", "transposed"):
        return _low(delta.A, delta.B, len(delta.A.spec.shape) - 2, alpha_of(delta))
    if isinstance(delta, Tucker):
        kernel = len(delta.mid.spec.shape) - 2
        return _low(_pointed(delta.down, kernel), delta.up, kernel, delta.alpha) | {"lora_mid.weight": delta.mid}
    if isinstance(delta, LoHa):
        alpha = _alpha(delta.alpha, delta.scale, delta.w1_b.spec.shape[0])
        return {f"hada_{field}": ref for field, ref in delta.refs().items()} | {"alpha": alpha}
    if isinstance(delta, LoKr):
        return {f"lokr_{field}": ref for field, ref in delta.refs().items()} | {"alpha": _kronecker(delta)}
    if isinstance(delta, LowRank):
        fact = f"a LoRA of a weight that lies as {delta.layer} ones do, which these files have only as a whole difference"
        raise NotExpressible(fact, remedy="convert it first: --kind dense")
    raise NotExpressible(f"these files cannot say {delta.called} delta", remedy=_REMEDY)


def _low(A: Ref, B: Ref, kernel: int, alpha: float) -> dict[str, Ref]:
    return {"lora_down.weight": A, "lora_up.weight": _pointed(B, kernel), "alpha": _nonzero(alpha)}


def _pointed(ref: Ref, kernel: int) -> Ref:
    return ref.reshape(*ref.spec.shape, *(1,) * kernel)


def _kronecker(delta: LoKr) -> Ref:
    if delta.exchanged:
        raise NotExpressible("its factors' indices are exchanged, as peft has them in a Conv1d", remedy=_REMEDY)
    if delta.rank is not None:
        return _alpha(delta.alpha, delta.scale, delta.rank)
    if delta.scale != 1:
        fact = "two whole factors under a scale; LyCORIS multiplies them by 1"
        raise NotExpressible(fact, found=delta.scale, expected="1", remedy=_REMEDY)
    return number(1.0 if delta.alpha is None else delta.alpha)


def _alpha(alpha: float | None, scale: float, rank: int) -> Ref:
    return _nonzero(alpha if alpha is not None and alpha / rank == scale else exact_alpha(scale, rank))


def _nonzero(alpha: float) -> Ref:
    if alpha == 0:
        raise NotExpressible("alpha is 0, which kohya reads as the rank and ComfyUI as no effect", remedy="leave this module out")
    return number(alpha)


def _magnitude(delta: DoRA) -> Ref:
    """(out, 1, …) or (1, in, …), with an axis of 1 for each of the kernel's."""
    size, direction = delta.magnitude.spec.numel, delta.direction
    kernel = _kernel(direction, len(delta.magnitude.spec.shape) - 2)
    return delta.magnitude.reshape(*((size, 1) if delta.axis == "out" else (1, size)), *(1,) * kernel)


def _kernel(direction: Additive, otherwise: int) -> int:
    return otherwise if direction.flat else len(direction.shape()) - 2
