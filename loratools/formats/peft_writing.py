"""What peft's writers share: which deltas a method's row can say, settings with their exceptions, and tensors saved whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from loratools.deltas.base import Delta
from loratools.formats.peft_keys import ROOT
from loratools.refs import Ref

WRITTEN_FOR = "0.21.2"
Modules: TypeAlias = "Mapping[str, Mapping[str, Delta]]"  # by path, then by the last component of the tensor's name


class Written(NamedTuple):
    """A method's tensors, by `PATH.SLOT`, and the settings of its config that give them their meaning."""

    tensors: Mapping[str, Ref]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Writing:
    """How a method is written: the kinds of a weight's delta that it says, and their tensors and settings.

    `write` gets all modules, for a config has one value for them all of most settings, and the fields of the config they came from,
    if it was of this method. It raises NotExpressible, naming each tensor, for what the method has no words for.
    """

    kinds: tuple[type[Delta], ...]
    write: Callable[[Modules, Mapping[str, Any]], Written]


def patterned(values: Mapping[str, Any], name: str, pattern: str, default: Any = 8) -> dict[str, Any]:
    """A setting of each module as the commonest value and, under anchored, escaped names, the others.

    >>> patterned({"a.q": 4, "a.k": 4, "a.v": 2}, "r", "rank_pattern")
    {'r': 4, 'rank_pattern': {'^a\\\\.v': 2}}
    """
    common = commonest(values.values(), default)
    return {name: common, pattern: {f"^{re.escape(path)}": value for path, value in sorted(values.items()) if value != common}}


def commonest(values: Iterable[Any], default: Any) -> Any:
    """The value that most have, the least of several; `default` of none."""
    counted = Counter(values).most_common()
    return min((value for value, count in counted if count == counted[0][1]), default=default)


def shortest(number: float) -> float:
    """A number as JSON has it: whole ones as such."""
    return int(number) if number == int(number) else number


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
