"""What peft's writers share: which deltas a method's row can say, settings with their exceptions, and tensors saved whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

from loratools.deltas.base import Delta
from loratools.errors import LoratoolsError, NotExpressible, raise_all
from loratools.formats.peft_keys import ROOT
from loratools.formats.peft_targets import dotted_key
from loratools.refs import Ref, same_bytes
from loratools.tensorfile import identity

WRITTEN_FOR = "0.21.2"
REMEDY = "convert it first: --kind lora, or --format loratools keeps it"
Modules: TypeAlias = "Mapping[str, Mapping[str, Delta]]"  # by path, then by the last component of the tensor's name
Kind = TypeVar("Kind", bound=Delta)


class Written(NamedTuple):
    """A method's tensors, by `PATH.SLOT`, the settings of its config that give them their meaning, and the adapter's own by slot.

    `targets` are the modules that the config has to name, where they are not those of the deltas.
    """

    tensors: Mapping[str, Ref]
    settings: Mapping[str, Any]
    shared: Mapping[str, Ref] = {}
    targets: Iterable[str] | None = None


@dataclass(frozen=True)
class Writing:
    """How a method is written: the kinds of a delta that it says, and their tensors and settings.

    `write` gets all modules, for a config has one value for them all of most settings, and the fields of the config they came from,
    if it was of this method. It raises NotExpressible, naming each tensor, for what the method has no words for. `says` tells more of
    which delta it is, where its class does not; `leaves` are the tensors of a module that it changes, None all.
    """

    kinds: tuple[type[Delta], ...]
    write: Callable[[Modules, Mapping[str, Any]], Written]
    says: Callable[[Delta], bool] = lambda delta: True
    leaves: tuple[str, ...] | None = ("weight", "bias")

    def takes(self, leaf: str, delta: Delta) -> bool:
        """Whether it has words for such a change of a module's tensor."""
        return (self.leaves is None or leaf in self.leaves) and isinstance(delta, self.kinds) and self.says(delta)


def refused(fact: str, found: Any = None, expected: Any = None, remedy: str = REMEDY) -> NotExpressible:
    return NotExpressible(fact, found=found, expected=expected, remedy=remedy)


def weights(modules: Modules, kind: type[Kind], leaf: str = "weight") -> dict[str, Kind]:
    """The modules' deltas of one kind."""
    found: dict[str, Kind] = {}
    for path, leaves in modules.items():
        delta = leaves.get(leaf)
        if not isinstance(delta, kind):
            raise refused("a change of no such kind beside those of the method").at(tensor=f"{path}.{next(iter(leaves))}")
        found[path] = delta
    return found


def each(deltas: Mapping[str, Any], tensors: Callable[[Any], Mapping[str, Ref]], leaf: str = "weight") -> dict[str, Ref]:
    """The tensors of all modules by `PATH.SLOT`; every fault is collected."""
    found: dict[str, Ref] = {}
    faults: list[LoratoolsError] = []
    for path, delta in deltas.items():
        try:
            found |= {f"{path}.{slot}": ref for slot, ref in tensors(delta).items()}
        except LoratoolsError as error:
            faults.append(error.at(tensor=f"{path}.{leaf}"))
    raise_all(faults)
    return found


# -- settings


def alike(values: Mapping[str, Any], name: str) -> Any:
    """The one value of a setting that all modules share. Raises NotExpressible, naming two that differ."""
    first, value = next(iter(values.items()))
    other = next((path for path, found in values.items() if found != value), None)
    if other is not None:
        fact = f"peft has one {name} for all modules"
        raise refused(fact, found=values[other], expected=f"{value}, as {first} has").at(tensor=f"{other}.weight")
    return value


def one_tensor(refs: Mapping[str, Ref], name: str) -> Ref:
    """The one tensor that all modules share. Raises NotExpressible, naming two that differ."""
    first, ref = next(iter(refs.items()))
    for path, other in refs.items():
        if identity(other) != identity(ref) and not same_bytes(other, ref):
            raise refused(f"peft has one {name} for all modules", found=f"another than {first} has").at(tensor=f"{path}.weight")
    return ref


def patterned(values: Mapping[str, Any], name: str, pattern: str, default: Any = 8) -> dict[str, Any]:
    """A setting of each module as the commonest value and, under anchored, escaped names, the others.

    >>> patterned({"a.q": 4, "a.k": 4, "a.v": 2}, "r", "rank_pattern")
    {'r': 4, 'rank_pattern': {'^a\\\\.v': 2}}
    """
    common = commonest(values.values(), default)
    return {name: common, pattern: {f"^{re.escape(path)}": value for path, value in sorted(values.items()) if value != common}}


def dotted_patterned(values: Mapping[str, Any], name: str, pattern: str) -> dict[str, Any]:
    """The same for the methods whose patterns fit what stands behind a dot, or are the whole of a name without one.

    Raises NotExpressible for a name that another ends in, where neither can be told from the other.

    >>> dotted_patterned({"a.q": 4, "a.k": 4, "q": 2, "a.v": 3}, "n", "n_pattern")
    {'n': 4, 'n_pattern': {'(?<=^a\\\\.)q': 4, '(?<=^a\\\\.)v': 3, 'q': 2}}
    """
    common = commonest(values.values(), 0)
    bare = {path for path, value in values.items() if "." not in path and value != common}
    told: dict[str, Any] = {}
    for path, value in sorted(values.items()):
        head, _, tail = path.partition(".")
        if tail and (value != common or path.rpartition(".")[2] in bare):
            told[f"(?<=^{re.escape(head)}\\.){re.escape(tail)}"] = value
    told |= {path: values[path] for path in sorted(bare)}
    wrong = next((path for path, value in values.items() if told.get(dotted_key(told, path), common) != value), None)
    if wrong is not None:
        raise refused(f"a {name} that no pattern of peft's can say").at(tensor=f"{wrong}.weight")
    return {name: common, pattern: told}


def commonest(values: Iterable[Any], default: Any) -> Any:
    """The value that most have, the least of several; `default` of none."""
    counted = Counter(values).most_common()
    return min((value for value, count in counted if count == counted[0][1]), default=default)


def shortest(number: float) -> float:
    """A number as JSON has it: whole ones as such."""
    return int(number) if number == int(number) else number


# -- tensors saved whole


def saved(whole: Mapping[str, Ref], adapted: Iterable[str], tokens: Iterable[str] = ()) -> tuple[dict[str, Ref], list[str], list[str]]:
    """Whole tensors under peft's keys, the modules that `modules_to_save` has to name, and the biases that lie alone."""
    tensors: dict[str, Ref] = {}
    modules: set[str] = set()
    wrapped = {path.replace(".base_layer.", "."): f"{path}.base_layer" for path in adapted}
    wrapped |= {path: f"{path}.token_adapter.base_layer" for path in tokens}
    loose = [name for name in whole if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" not in whole]
    for name, ref in whole.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{ROOT}{wrapped.get(module, module)}.{leaf}" if module else ROOT + name] = ref
        if name not in loose and module not in wrapped and leaf in ("weight", "bias"):
            modules.add(module)
    return tensors, sorted(modules), loose
