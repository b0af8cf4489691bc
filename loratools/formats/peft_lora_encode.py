"""The modules of a LoRA on their way into peft's files: factors, magnitudes, biases, and the variants that hold for a whole adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.deltas.base import Additive, Delta
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Full
from loratools.deltas.kasa import KaSA
from loratools.deltas.laid import Turned, Unsettled
from loratools.deltas.lowrank import LowRank
from loratools.deltas.residual import Residual
from loratools.deltas.rows import Rows
from loratools.errors import LoratoolsError, NotExpressible
from loratools.formats._mixed import mixed
from loratools.formats._refused import KEPT
from loratools.formats.peft_keys import ROOT
from loratools.formats.peft_writing import REMEDY
from loratools.refs import Ref

KASA = {"beta": 0.0001, "gamma": 0.001}  # what KasaConfig says of training where nothing else does


@dataclass
class Modules:
    """LoRA by module: `lows` has all of them; `diagonals` are KaSA's, `moved` what initialisation took from each one's weight."""

    lows: dict[str, LowRank] = field(default_factory=dict)
    magnitudes: dict[str, Ref] = field(default_factory=dict)
    biases: dict[str, Full] = field(default_factory=dict)
    tokens: dict[str, Rows] = field(default_factory=dict)
    diagonals: dict[str, Ref] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)

    @property
    def init(self) -> str | None:
        """The initialisation that changed the base, if one did."""
        return next(iter(self.moved.values()), None)

    def settings(self, stated: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of variants and trained tokens, if any; what matters in training comes from the config it was read with."""
        told = stated.get("kasa_config")
        found: dict[str, Any] = {"kasa_config": told if isinstance(told, dict) else KASA} if self.diagonals else {}
        indices = {module: list(rows.indices) for module, rows in sorted(self.tokens.items())}
        return found | ({"trainable_token_indices": indices} if indices else {})

    def mixed(self, parameters: Collection[str] = ()) -> list[LoratoolsError]:
        """What holds for a whole adapter in peft, and here for some of its modules only."""
        doras, plain = ([f"{name}.weight" for name in self.lows if (name in self.magnitudes) is which] for which in (True, False))
        faults: list[LoratoolsError] = [*mixed(doras, plain, "peft's use_dora holds for the whole adapter")]
        for held, what in ((self.diagonals, "KaSA"), (self.moved, self.init)):
            other = [module for module in self.lows if held and module not in held]
            if other:
                fact = f"peft has {what} on all modules of an adapter, and this one is plain LoRA"
                faults.append(NotExpressible(fact, tensor=f"{other[0]}.weight", remedy="--format loratools keeps it"))
        if len(set(self.moved.values())) > 1:
            other = [module for module, init in self.moved.items() if init != self.init]
            fact, found = "peft initialises all modules of an adapter alike", self.moved[other[0]]
            faults.append(NotExpressible(fact, tensor=f"{other[0]}.weight", found=found, remedy="--format loratools keeps it"))
        if parameters and (self.magnitudes or self.biases or self.diagonals or self.moved):
            what = "DoRA" if self.magnitudes else "lora_bias" if self.biases else "KaSA" if self.diagonals else self.init
            remedy = "write the parameters' LoRA as an adapter of its own"
            faults.append(NotExpressible(f"peft allows no {what} beside LoRA on parameters", tensor=next(iter(parameters)), remedy=remedy))
        return faults + self._mixed_biases()

    def _mixed_biases(self) -> list[LoratoolsError]:
        faults: list[LoratoolsError] = []
        bare = [module for module, low in self.lows.items() if module not in self.biases and low.layer != "embedding"]
        if self.biases and bare:
            fact = "peft's lora_bias holds for the whole adapter, and this module has none"
            faults.append(NotExpressible(fact, tensor=f"{bare[0]}.bias", remedy=KEPT))
        if self.magnitudes and self.biases:
            first = f"{next(iter(self.biases))}.bias"
            faults.append(NotExpressible("peft allows no lora_bias beside DoRA", tensor=first, remedy=KEPT))
        for module, bias in self.biases.items():
            low = self.lows.get(module)
            if low is None or low.layer == "embedding" or bias.scale != low.scaling:
                fact = "a bias difference needs a LoRA of the same scaling on its module"
                faults.append(NotExpressible(fact, tensor=f"{module}.bias", remedy=KEPT))
        return faults

    def tensors(self) -> dict[str, Ref]:
        """All of it under peft's keys."""
        tensors: dict[str, Ref] = {}
        for module, low in self.lows.items():
            root, magnitude = ROOT + module, self.magnitudes.get(module)
            if low.layer == "embedding":
                tensors |= {f"{root}.lora_embedding_A": low.B.T, f"{root}.lora_embedding_B": low.A.T}
            else:
                written = low.transposed() if low.layer == "transposed" else low
                ones = (1,) * (len(low.A.spec.shape) - 2)
                tensors |= {f"{root}.lora_A.weight": written.A, f"{root}.lora_B.weight": written.B.reshape(*written.B.spec.shape, *ones)}
            if magnitude is not None:
                size, kernel = magnitude.spec.numel, len(low.A.spec.shape) - 2
                shape = (1, size, *(1,) * kernel) if low.layer == "conv" else (size,)
                tensors[f"{root}.lora_magnitude_vector"] = magnitude.reshape(*shape)
            if module in self.biases:
                tensors[f"{root}.lora_B.bias"] = self.biases[module].diff
            if module in self.diagonals:
                tensors[f"{root}.lora_diag"] = self.diagonals[module]
        return tensors


def take(name: str, delta: Delta, made: Modules) -> LoratoolsError | None:
    """Put a delta where it belongs; the fault that says why peft's LoRA has no place for it."""
    module, _, leaf = name.rpartition(".")
    if isinstance(delta, Rows) and leaf == "weight":
        made.tokens[module] = delta
        return None
    if isinstance(delta, Full) and leaf == "bias":
        made.biases[module] = delta
        return None
    inner = delta.delta if isinstance(delta, Unsettled | Turned) else delta
    if isinstance(inner, Residual) and leaf == "weight":
        made.moved[module] = inner.init
        lies = isinstance(delta, Turned) or (isinstance(delta, Unsettled) and delta.transposed is True)
        return take(name, _stored(inner.then) if lies else inner.then, made)
    if isinstance(inner, KaSA) and leaf == "weight":
        made.diagonals[module] = inner.d
        delta = LowRank(A=inner.A, B=inner.B, alpha=inner.alpha, rslora=inner.rslora, layer="linear")
    direction = delta.direction if isinstance(delta, DoRA) else delta
    if isinstance(direction, LowRank) and leaf == "weight":
        made.lows[module] = direction
        if isinstance(delta, DoRA):
            made.magnitudes[module] = delta.magnitude
            if direction.layer != "unknown" and delta.axis != ("in" if direction.layer in ("transposed", "embedding") else "out"):
                found, remedy = list(delta.magnitude.spec.shape), "convert --magnitude-axis out --base BASE refits it"
                return NotExpressible("peft has no DoRA along this axis", tensor=name, found=found, remedy=remedy)
        return None
    return _fault(name, delta)


def _stored(then: LowRank | DoRA) -> LowRank | DoRA:
    """A change that is told of (out, in) as that of a weight which lies the other way round."""
    turned = then.transposed()
    if isinstance(turned, LowRank):
        return replace(turned, layer="transposed")
    assert isinstance(turned.direction, LowRank)
    return replace(turned, direction=replace(turned.direction, layer="transposed"))


def _fault(name: str, delta: Delta) -> LoratoolsError:
    direction = delta.direction if isinstance(delta, DoRA) else delta
    if isinstance(delta, DoRA) and isinstance(direction, LowRank):
        remedy = "write --format loratools, which keeps it"
        return NotExpressible("peft has no DoRA of what is no layer's weight", tensor=name, remedy=remedy)
    if isinstance(delta, DoRA) and isinstance(direction, Additive):
        remedy = "convert --kind lora makes a direction of it, --format loratools keeps it"
        return NotExpressible(f"peft's LoRA cannot say a DoRA of {direction.called} direction", tensor=name, remedy=remedy)
    return NotExpressible(f"peft's LoRA cannot say {delta.called} delta", tensor=name, remedy=REMEDY)
