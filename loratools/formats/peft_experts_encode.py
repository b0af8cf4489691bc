"""LoRA on bare parameters as peft has it (`target_parameters`): the inverse of what `peft_experts` reads.

The wrappers of one module lie within each other in the order in which the model registers their parameters, the first innermost; which
axis A reads is that of the version the config names, and of peft 0.21.2 where the model is known (`deltas.axes`). An expert's matrices
are the same numbers both ways round: (Bₑ·Aₑ)ᵀ = Aₑᵀ·Bₑᵀ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from loratools.adapter import Adapter
from loratools.deltas.axes import turned_by
from loratools.deltas.base import Delta
from loratools.deltas.experts import PACKINGS, Experts
from loratools.deltas.lowrank import LowRank
from loratools.deltas.parameters import OnParameter
from loratools.deltas.registered import REGISTERED, in_registered_order
from loratools.errors import LoratoolsError, NotExpressible
from loratools.families import Family
from loratools.formats._derived import Derived
from loratools.formats._refused import KEPT
from loratools.formats.peft_targets import selected
from loratools.formats.peft_writing import WRITTEN_FOR
from loratools.refs import Ref

if TYPE_CHECKING:
    import numpy as np

_INNER = ".base_layer"
_BASE = "give convert --base BASE"


class Scale(NamedTuple):
    """What a config says of a module's or a parameter's factors."""

    rank: int
    alpha: float
    rslora: bool


@dataclass
class Parameters:
    """The wrappers of an adapter's parameters: tensors by key without prefix, and what the config says of each parameter.

    `names` are those of the deltas they came from, `version` the one whose axes they have; `faults` are NotExpressible.
    """

    version: str
    tensors: dict[str, Ref] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    faults: list[LoratoolsError] = field(default_factory=list)


def parameters_of(adapter: Adapter, deltas: Mapping[str, Delta]) -> Parameters:
    """What of the deltas is LoRA on bare parameters, as peft writes it."""
    stated = adapter.metadata.get("peft", {})
    found = {name: delta for name, delta in deltas.items() if _bare(name, delta, stated.get("target_parameters"))}
    types = Family(dict(adapter.model)).types
    made = Parameters(WRITTEN_FOR if types else str(stated.get("peft_version") or WRITTEN_FOR), names=tuple(found))
    modules: dict[str, dict[str, LowRank | Experts]] = defaultdict(dict)
    for name, delta in found.items():
        try:
            if isinstance(delta, OnParameter):
                _keep(made, delta)
                continue
            laid = _laid(delta, turned_by(made.version, types)) if isinstance(delta, Experts) else _matrix(delta)
            modules[_module(name)][name] = laid
            made.scales[name] = Scale(laid.rank, laid.alpha, laid.rslora)
        except LoratoolsError as error:
            made.faults.append(error.at(tensor=name))
    for module, own in modules.items():
        try:
            made.tensors |= _nested(module, own)
        except LoratoolsError as error:
            made.faults.append(error)
    return made


def _bare(name: str, delta: Delta, parameters: Any) -> bool:
    """Whether a change is of a parameter that is no layer's weight, or that the config names as one."""
    if isinstance(delta, Experts | OnParameter):
        return True
    named = isinstance(parameters, list) and selected(parameters, name)
    return isinstance(delta, LowRank) and len(delta.A.spec.shape) == 2 and (named or name.rpartition(".")[2] != "weight")


def _matrix(delta: Delta) -> LowRank:
    assert isinstance(delta, LowRank)
    if delta.layer in ("embedding", "transposed"):
        raise NotExpressible(f"peft's LoRA on parameters knows no {delta.layer} ones", remedy=KEPT)
    return delta


def _module(name: str) -> str:
    module = name.rpartition(".")[0]
    if not module:
        raise NotExpressible("peft puts LoRA on a module's parameters, and this has no module", remedy="--format loratools keeps it")
    return module


def _keep(made: Parameters, delta: OnParameter) -> None:
    """A wrapper of which only a base would tell what it is about goes back as it came; its candidates are all named."""
    if delta.packing != PACKINGS[0] or any(choice.plain or choice.rank is None for choice in delta.choices):
        fact = "LoRA on a parameter of which only the base tells which it is, or how many experts it has"
        raise NotExpressible(fact, remedy=_BASE)
    root = delta.module + _INNER * delta.depth
    made.tensors |= {f"{root}.lora_A.weight": delta.A, f"{root}.lora_B.weight": delta.B}
    made.scales |= {choice.name: Scale(choice.rank, choice.alpha, delta.rslora) for choice in delta.choices if choice.rank is not None}


def _nested(module: str, own: Mapping[str, LowRank | Experts]) -> dict[str, Ref]:
    """The tensors of one module's wrappers. Raises NotExpressible for parameters whose order no table knows."""
    ordered = in_registered_order(own)
    unknown = [name for name in ordered if name.rpartition(".")[2] not in REGISTERED]
    if len(unknown) > 1:
        fact = "peft nests the parameters of a module in the order in which the model registers them, which is not known of these"
        raise NotExpressible(fact, tensor=unknown[0], found=", ".join(unknown), remedy="write an adapter for each of them")
    tensors: dict[str, Ref] = {}
    for depth, name in enumerate(reversed(ordered)):
        root = module + _INNER * depth
        tensors |= {f"{root}.lora_A.weight": own[name].A, f"{root}.lora_B.weight": own[name].B}
    return tensors


# -- which way round


def _laid(delta: Experts, wanted: bool | None) -> Experts:
    """The experts packed as peft packs them, A reading the axis that the version's A reads."""
    if wanted is None and delta.turned:
        fact = "which axis of a stack A reads depends on peft's version and on the model, which nothing tells"
        raise NotExpressible(fact, remedy="give convert --base BASE, with its config.json")
    if delta.packing != PACKINGS[0]:
        delta = replace(delta, B=_ranks_first(delta.B, delta.experts), packing=PACKINGS[0])
    if wanted is None or wanted == delta.turned or delta.experts == 1:
        return delta
    return replace(delta, A=_experts_apart(delta.B, delta.experts), B=_experts_beside(delta.A, delta.experts), turned=wanted)


def _ranks_first(B: Ref, experts: int) -> Ref:
    """B (out, experts·r), an expert's columns together, with the experts fastest."""
    out, count = B.spec.shape

    def make(found: np.ndarray) -> np.ndarray:
        return found.reshape(out, experts, count // experts).transpose(0, 2, 1).reshape(out, count)

    return Derived(B, (out, count), make)


def _experts_apart(B: Ref, experts: int) -> Ref:
    """B (out, r·experts) as an A: (experts·r, out)."""
    out, count = B.spec.shape

    def make(found: np.ndarray) -> np.ndarray:
        return found.reshape(out, count // experts, experts).transpose(2, 1, 0).reshape(count, out)

    return Derived(B, (count, out), make)


def _experts_beside(A: Ref, experts: int) -> Ref:
    """A (experts·r, in) as a B: (in, r·experts)."""
    count, width = A.spec.shape

    def make(found: np.ndarray) -> np.ndarray:
        return found.reshape(experts, count // experts, width).transpose(2, 1, 0).reshape(width, count)

    return Derived(A, (width, count), make)
