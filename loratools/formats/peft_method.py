"""One of peft's methods as a row of a table: its keys, its config's fields, and the deltas its tensors make.

The row says all that this file needs to hold the promise: a tensor no slot names, a slot that the deltas do not use, a field that the
row lacks, a setting that the config should give and does not, are each an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from loratools.deltas.base import Delta
from loratools.deltas.full import Replacement
from loratools.deltas.laid import Unsettled
from loratools.deltas.lowrank import LowRank
from loratools.deltas.rows import Rows
from loratools.errors import FormatError, LoratoolsError, UnsupportedError, raise_all
from loratools.families import matches
from loratools.formats import peft_targets
from loratools.formats.base import Container, ReadOptions
from loratools.formats.peft_keys import Key, Module, Sorted, check_targeted, sort_keys
from loratools.formats.peft_part import Part
from loratools.formats.peft_targets import Targets, targets_of
from loratools.formats.peft_values import Values, given, short, unknown
from loratools.formats.peft_writing import Writing
from loratools.refs import same_bytes


class Found(NamedTuple):
    """What reading a file gave: its config, its tensors by what they are, their deltas, what a person should be told, and the files of
    the adapter as it was initialised, where they were needed."""

    config: Targets
    tensors: Sorted
    deltas: dict[str, Delta]
    notes: tuple[str, ...]
    initial: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row: `slots` are what follows a module's path in its keys, `shared` what follows `base_model.` in the adapter's own.

    Both are regular expressions. `settings` are the config's fields that decide the arithmetic, `training` those that do not;
    `refused` fields change it in ways that are not done here, unless null, false or empty; `needed` ones have to be true, or the file
    lacks what the formula needs. `make` gives a module's deltas by the last component of their tensor's name; a lone delta is its
    weight's. A weight's delta is that of a linear layer's (out, in) or a convolution's (out, in, *kernel); where the base stores the
    transpose it is turned. `conv1d`: whether peft puts the method on such layers, transformers' `Conv1D`, at all. With `tying`, modules
    that the config does not target may repeat a targeted one's tensors: they are tied to it. Keys of the `dotted` patterns fit only what
    stands behind a dot. `writing` writes it, where that can be done. `tensor` is the one of a targeted module that the method changes,
    `*` all of them.
    """

    peft_type: str
    title: str
    slots: tuple[str, ...]
    make: Callable[[Part], Delta | Mapping[str, Delta]]
    shared: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    needed: Mapping[str, str] = field(default_factory=dict)
    own_biases: str | None = None
    tying: bool = False
    conv1d: bool = True
    dotted: tuple[str, ...] = ()
    tensor: str = "weight"
    notes: tuple[str, ...] = ()
    writing: Writing | None = None

    def grammar(self) -> Callable[[str], Key | None]:
        """The reading of a key without its prefix."""
        own = re.compile(rf"(?P<module>.+?)\.(?P<slot>{'|'.join(self.slots)})") if self.slots else None
        bank = re.compile(rf"base_model\.(?P<slot>{'|'.join(self.shared)})") if self.shared else None

        def read(path: str) -> Key | None:
            if bank and (match := bank.fullmatch(path)):
                return Key("", match["slot"])
            match = own.fullmatch(path) if own else None
            return Key(match["module"], match["slot"]) if match else None

        return read


def read(container: Container, options: ReadOptions, method: Method) -> Found:
    """A file of one of peft's methods by its row; every fault is collected."""
    stated = container.config or {}
    config = _config(stated, method)
    found = sort_keys(container, config, method.grammar())
    bank = found.modules.pop("", Module())
    notes = dict.fromkeys(method.notes + (_without_copies(found, config) if method.tying else ()))
    deltas: dict[str, Delta] = {}
    banked: set[str] = set()
    faults: list[LoratoolsError] = []
    for path, module in found.modules.items():
        part = Part(path, module, bank, stated, found.modules, method.dotted)
        try:
            check_targeted(path, module, config, nested=False)
            for leaf, delta in _made(method, part).items():
                deltas[f"{path}.{leaf}"] = _laid(f"{path}.{leaf}", delta, method, options)
            faults += [_unused(module.keys[slot]) for slot in module.refs if slot not in part.used]
        except LoratoolsError as error:
            faults.append(error.at(tensor=next(iter(module.keys.values()))))
        banked |= part.banked
        notes |= dict.fromkeys(part.notes)
    if found.modules and not faults:
        faults += [_unused(bank.keys[slot]) for slot in bank.refs if slot not in banked]
    raise_all(faults)
    return Found(config, found, deltas, tuple(notes))


def _without_copies(found: Sorted, config: Targets) -> tuple[str, ...]:
    """Takes off the modules that repeat, under a name the config does not target, the tensors of one that it does: tied ones."""
    targeted = [module for path, module in found.modules.items() if config.targets(path)]
    copies = [path for path, module in found.modules.items() if not config.targets(path) and any(_equal(module, one) for one in targeted)]
    for path in copies:
        del found.modules[path]
    return (f"not needed, copies under the names of tied modules: {', '.join(copies)}",) if copies else ()


def _equal(one: Module, other: Module) -> bool:
    return one.refs.keys() == other.refs.keys() and all(same_bytes(ref, other.refs[slot]) for slot, ref in one.refs.items())


def _unused(key: str) -> FormatError:
    return FormatError("not used by this method's formula", tensor=key)


def _config(stated: Mapping[str, Any], method: Method) -> Targets:
    """The fields all methods have, once every field is known to the row."""
    faults: list[LoratoolsError] = []
    known = {*peft_targets.USED, *peft_targets.TRAINING, *method.settings, *method.training, *method.refused, *method.needed}
    faults += [unknown(name, method.peft_type) for name, value in stated.items() if name not in known and given(value)]
    faults += [
        UnsupportedError(f"{name}: {why}", found=short(stated[name])) for name, why in method.refused.items() if given(stated.get(name))
    ]
    values = Values(stated, faults)
    faults += [
        UnsupportedError(f"{name} is not set: {why}", remedy=f"load it with peft, set {name} in its config, and save it again")
        for name, why in method.needed.items()
        if not values.flag(name)
    ]
    carried = {*peft_targets.USED, *peft_targets.TRAINING, *method.settings, *method.training, *method.needed}
    result = Targets(**targets_of(values, own_biases=method.own_biases, carried=carried), tensor=method.tensor)
    raise_all(faults)
    return result


def _made(method: Method, part: Part) -> Mapping[str, Delta]:
    made = method.make(part)
    return {"weight": made} if isinstance(made, Delta) else made


def _laid(name: str, delta: Delta, method: Method, options: ReadOptions) -> Delta:
    """A weight's delta, turned where the user says its weight is stored transposed, open where nothing tells yet."""
    if not name.endswith(".weight") or isinstance(delta, LowRank | Replacement | Rows | Unsettled):
        return delta
    return Unsettled(delta=delta, transposed=True if matches(name, options.transposed) else None if method.conv1d else False)
