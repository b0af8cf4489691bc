"""VeRA, PVeRA, RandLoRA, VBLoRA and UniLoRA as peft has them: what all layers share once, and each layer's own.

The inverse of what `peft_banked` reads; peft 0.21.2, `tuners/<method>/`. Projections that a file left to be drawn again are left so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loratools.deltas.randlora import RandLoRA
from loratools.deltas.seeded import Bank, Bases
from loratools.deltas.unilora import UniLoRA
from loratools.deltas.vblora import VBLoRA
from loratools.deltas.vera import PVeRA, VeRA
from loratools.formats._scale import exact_alpha
from loratools.formats.peft_writing import Modules, Writing, Written, alike, each, one_tensor, refused, shortest, weights
from loratools.refs import Ref


def _projections(deltas: Mapping[str, VeRA | RandLoRA], prefix: str, stated: Mapping[str, Any]) -> Written:
    """The shared projections, or the seed that they are drawn from; RandLoRA's bases have two settings more."""
    drawn = alike({path: delta.bank is not None for path, delta in deltas.items()}, "save_projection")
    settings: dict[str, Any] = {"save_projection": not drawn, "init_weights": True}
    if not drawn:
        refs = {name: {path: delta.refs()[name] for path, delta in deltas.items()} for name in "AB"}
        shared = {f"{prefix}_{name}": one_tensor(held, f"{prefix}_{name}") for name, held in refs.items()}
        seed = stated.get("projection_prng_key")
        flags = {name: bool(stated.get(name)) for name in ("sparse", "very_sparse") if prefix == "randlora"}
        return Written({}, settings | flags | {"projection_prng_key": 0 if seed is None else seed}, shared)
    banks = {path: delta.bank for path, delta in deltas.items() if delta.bank is not None}
    settings["projection_prng_key"] = alike({path: bank.seed for path, bank in banks.items()}, "projection_prng_key")
    settings |= {name: alike({path: getattr(bank, name) for path, bank in banks.items()}, name) for name in _flags(banks)}
    for path, bank in banks.items():
        _check_size(deltas, bank, path)
    return Written({}, settings)


def _flags(banks: Mapping[str, Bank]) -> tuple[str, ...]:
    return ("sparse", "very_sparse") if any(isinstance(bank, Bases) for bank in banks.values()) else ()


def _check_size(deltas: Mapping[str, VeRA | RandLoRA], bank: Bank, path: str) -> None:
    """peft draws as much as the largest of the modules that it finds needs: fewer modules than were trained draw other numbers."""
    shapes = [delta.shape() for delta in deltas.values()]
    if bank.out and all(len(shape) == 2 for shape in shapes):
        largest = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
        if largest != (bank.out, bank.width):
            fact = "its projections were drawn for larger layers than these, and peft would draw others"
            raise refused(fact, found=list(largest), expected=[bank.out, bank.width]).at(tensor=f"{path}.weight")


def _vera(kind: type[VeRA], prefix: str) -> Callable[[Modules, Mapping[str, Any]], Written]:
    def write(modules: Modules, stated: Mapping[str, Any]) -> Written:
        deltas = weights(modules, kind)
        made = _projections(deltas, prefix, stated)
        _check_cut(deltas, made.shared.get(f"{prefix}_A"), made.shared.get(f"{prefix}_B"))
        rank = alike({path: delta.rank for path, delta in deltas.items()}, "r")
        tensors = each(deltas, lambda delta: {f"{prefix}_lambda_b": delta.b, f"{prefix}_lambda_d": delta.d})
        return made._replace(tensors=tensors, settings={**made.settings, "r": rank})

    return write


def _check_cut(deltas: Mapping[str, VeRA], A: Ref | None, B: Ref | None) -> None:
    """peft makes A and B as large as its largest module, and loads no others."""
    if A is None or B is None:
        return
    out, widths = max(delta.b.spec.numel for delta in deltas.values()), [delta.width for delta in deltas.values()]
    width = A.spec.shape[1] if None in widths else max(width or 0 for width in widths)
    if (B.spec.shape[0], A.spec.shape[1]) != (out, width):
        path, fact = next(iter(deltas)), "peft makes its projections as large as its largest layer, and these are larger"
        raise refused(fact, found=[B.spec.shape[0], A.spec.shape[1]], expected=[out, width]).at(tensor=f"{path}.weight")


def _randlora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, RandLoRA)
    made = _projections(deltas, "randlora", stated)
    ranks = {path: delta.lambdas.spec.shape[0] for path, delta in deltas.items()}
    alphas = {path: exact_alpha(delta.scale, ranks[path]) if delta.alpha is None else delta.alpha for path, delta in deltas.items()}
    settings = {"r": alike(ranks, "r"), "randlora_alpha": shortest(alike(alphas, "randlora_alpha"))}
    return made._replace(tensors=each(deltas, _randlora_slots), settings={**made.settings, **settings})


def _randlora_slots(delta: RandLoRA) -> dict[str, Ref]:
    """peft writes the shared bases once more under each module, and misses them where they are not."""
    own = {"randlora_lambda": delta.lambdas, "randlora_gamma": delta.gamma}
    copies = {"randlora_A": delta.copy_a or delta.A, "randlora_B": delta.copy_b or delta.B}
    return own | {slot: ref for slot, ref in copies.items() if ref is not None}


def _vblora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, VBLoRA)
    vectors = one_tensor({path: delta.vectors for path, delta in deltas.items()}, "vblora_vector_bank")
    settings = {
        "r": alike({path: delta.facts()["rank"] for path, delta in deltas.items()}, "r"),
        "topk": alike({path: delta.topk for path, delta in deltas.items()}, "topk"),
        "save_only_topk_weights": alike({path: _places_alone(delta) for path, delta in deltas.items()}, "save_only_topk_weights"),
        "num_vectors": vectors.spec.shape[0], "vector_length": vectors.spec.shape[1],
    }  # fmt: skip
    return Written(each(deltas, _vblora_slots), settings, {"vblora_vector_bank": vectors})


def _places_alone(delta: VBLoRA) -> bool:
    if (delta.logits_a is None) != (delta.logits_b is None):
        raise refused("peft has logits of both sides, or of none")
    return delta.logits_a is None


def _vblora_slots(delta: VBLoRA) -> dict[str, Ref]:
    spelt = {"logits": "", "places": "_topk_indices", "weights": "_topk_weights"}
    refs = {f"vblora_logits_{side.upper()}{end}": delta.refs().get(f"{what}_{side}") for side in "ab" for what, end in spelt.items()}
    return {slot: ref for slot, ref in refs.items() if ref is not None}


def _unilora(modules: Modules, stated: Mapping[str, Any]) -> Written:
    deltas = weights(modules, UniLoRA)
    theta = one_tensor({path: delta.theta for path, delta in deltas.items()}, "unilora_theta_d")
    rank = alike({path: delta.facts()["rank"] for path, delta in deltas.items()}, "r")
    settings = {"r": rank, "theta_d_length": theta.spec.numel, "save_indices": True, "init_weights": True}
    return Written(each(deltas, _unilora_slots), settings, {"unilora_theta_d": theta})


def _unilora_slots(delta: UniLoRA) -> dict[str, Ref]:
    return {f"unilora_{what}_{side.upper()}": delta.refs()[f"{what}_{side}"] for what in ("indices", "scales") for side in "ab"}


VERA = Writing((VeRA,), _vera(VeRA, "vera"), says=lambda delta: type(delta) is VeRA, leaves=("weight",))
PVERA = Writing((PVeRA,), _vera(PVeRA, "pvera"), leaves=("weight",))
RANDLORA = Writing((RandLoRA,), _randlora, leaves=("weight",))
VBLORA = Writing((VBLoRA,), _vblora, leaves=("weight",))
UNILORA = Writing((UniLoRA,), _unilora, leaves=("weight",))
