"""One module of a peft file as a method's row asks for it: its tensors by slot, the adapter's own, the settings that its path has.

What is taken is remembered, so that `peft_method` can name what no formula used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.errors import FormatError, LoratoolsError, ShapeError, raise_all
from loratools.formats._patterns import pattern_key
from loratools.formats.peft_keys import Module
from loratools.formats.peft_targets import dotted_key, selected
from loratools.formats.peft_values import Values, finite, short
from loratools.refs import Ref


@dataclass
class Part:
    """One module's tensors and settings, as a row's `make` asks for them; what it takes is remembered, and what it notes.

    `paths` are those of all modules that the file adapts.
    """

    path: str
    module: Module
    bank: Module
    config: Mapping[str, Any]
    paths: Collection[str] = ()
    dotted: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    banked: set[str] = field(default_factory=set)

    def __getitem__(self, slot: str) -> Ref:
        """A tensor that has to be there."""
        found = self.get(slot)
        if found is None:
            near = next(iter(self.module.keys.values()), None)
            raise FormatError(f"has no {slot} beside it", tensor=near, remedy="the file is incomplete")
        return found

    def get(self, slot: str) -> Ref | None:
        """A tensor that may be there."""
        self.used.add(slot)
        return self.module.refs.get(slot)

    def slots(self) -> list[str]:
        """All slots of the module that the file fills, in the file's order."""
        return list(self.module.refs)

    def shared(self, slot: str, remedy: str = "the file is incomplete") -> Ref:
        """A tensor of the whole adapter that has to be there."""
        self.banked.add(slot)
        if slot not in self.bank.refs:
            raise FormatError(f"the file has no base_model.{slot}", remedy=remedy)
        return self.bank.refs[slot]

    def has_shared(self, slot: str) -> bool:
        return slot in self.bank.refs

    # -- settings; a pattern, where one fits the module, goes before the setting itself

    def number(self, name: str, *, pattern: str | None = None) -> float:
        value = self._setting(name, pattern)
        if not finite(value):
            raise _wrong(name, value, "a number")
        return float(value)

    def whole(self, name: str, *, pattern: str | None = None) -> int:
        value = self._setting(name, pattern)
        if type(value) is not int:
            raise _wrong(name, value, "a whole number")
        return value

    def rank(self, name: str, found: int, *, pattern: str | None = "rank_pattern") -> int:
        """The tensors' rank, which must be the config's where it states one."""
        stated = self._stated(name, pattern)
        if stated is not None and stated != found:
            raise ShapeError("the rank is not the config's", found=found, expected=short(stated))
        return found

    def naturals(self, name: str) -> tuple[int, ...]:
        value = self._setting(name, None)
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise _wrong(name, value, "a list of whole numbers from 0 up")
        return tuple(value)

    def listed(self, name: str) -> bool:
        """Whether a field that selects modules, by any ending of their paths or a regular expression, selects this one."""
        faults: list[LoratoolsError] = []
        chosen = Values(self.config, faults).target(name)
        raise_all(faults)
        return selected(chosen, self.path) if isinstance(chosen, str) else any(self.path.endswith(ending) for ending in chosen or ())

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value

    def word(self, name: str, *known: str) -> str:
        value = self._setting(name, None)
        if value not in known:
            raise _wrong(name, value, " or ".join(known))
        return str(value)

    def _stated(self, name: str, pattern: str | None) -> Any:
        table = self.config.get(pattern) if pattern else None
        if table is not None and not isinstance(table, dict):
            raise _wrong(str(pattern), table, "regular expressions mapped to values")
        key = dotted_key if pattern in self.dotted else pattern_key
        return (table or {}).get(key(table or {}, self.path), self.config.get(name))

    def _setting(self, name: str, pattern: str | None) -> Any:
        value = self._stated(name, pattern)
        if value is None:
            remedy = "without it the tensors have no meaning: add what it was trained with"
            raise FormatError(f"adapter_config.json lacks {name}", remedy=remedy)
        return value


def _wrong(name: str, value: Any, expected: str) -> FormatError:
    return FormatError(f"adapter_config.json: {name}", found=short(value), expected=expected)
