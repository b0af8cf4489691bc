"""Typed reading of an adapter_config.json: each value is what its field allows, or a fault is gathered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import FormatError, LoratoolsError, UnsupportedError
from loratools.formats._lora_settings import given as given
from loratools.formats._lora_settings import short as short
from loratools.formats._scalar import finite as finite


@dataclass(frozen=True)
class Values:
    """A config, or a table `within` one, its values read by name and type; faults are gathered, not raised."""

    config: Mapping[str, Any]
    faults: list[LoratoolsError]
    within: str = ""

    def fault(self, name: str, expected: str) -> None:
        self.faults.append(FormatError(f"adapter_config.json: {self.within}{name}", found=short(self.config.get(name)), expected=expected))

    def known(self, *names: str) -> None:
        """A fault for every other field that says something."""
        self.faults.extend(unknown(self.within + name) for name, value in self.config.items() if name not in names and given(value))

    def needed(self, name: str) -> int:
        """A whole number of at least 1 that has to be stated."""
        if self.config.get(name) is None:
            self.fault(name, "a whole number of at least 1")
        return self.rank(name) or 1

    def flag(self, name: str) -> bool:
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            self.fault(name, "true or false")
        return value is True

    def number(self, name: str) -> float | None:
        value = self.config.get(name)
        if value is None:
            return None
        if not finite(value):
            self.fault(name, "a number")
            return None
        return float(value)

    def rank(self, name: str) -> int | None:
        value = self.config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            self.fault(name, "a whole number of at least 1")
            return None
        return value

    def patterns(self, name: str, *, whole: bool) -> dict[str, Any]:
        value = self.config.get(name)
        if value is None:
            return {}
        good = isinstance(value, dict) and all((type(v) is int and v > 0) if whole else finite(v) for v in value.values())
        if not good:
            self.fault(name, "regular expressions mapped to " + ("ranks" if whole else "numbers"))
            return {}
        return {pattern: number for pattern, number in value.items() if self.compiles(name, pattern)}

    def compiles(self, name: str, pattern: str) -> bool:
        try:
            re.compile(f"({pattern})")  # as it will be used: flags for the whole have no place in it
        except re.error as error:
            self.faults.append(FormatError(f"adapter_config.json: {name}: not a regular expression ({error})", found=pattern))
            return False
        return True

    def names(self, name: str) -> tuple[str, ...]:
        value = self.config.get(name)
        value = [value] if isinstance(value, str) else value
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            self.fault(name, "a list of names")
            return ()
        return tuple(value or ())

    def target(self, name: str) -> Any:
        value = self.config.get(name)
        if isinstance(value, str):
            return value if self.compiles(name, value) else None
        return self.names(name) or None

    def layers(self, name: str) -> tuple[int, ...] | None:
        value = self.config.get(name)
        value = [value] if type(value) is int else value
        if value is not None and not (isinstance(value, list) and all(type(item) is int for item in value)):
            self.fault(name, "layer numbers")
            return None
        return None if value is None else tuple(value)


def unknown(name: str, peft_type: str = "LORA") -> UnsupportedError:
    remedy = "if it only matters in training, set it to null in adapter_config.json"
    fact = f"adapter_config.json sets {name}, which this version does not know" + ("" if peft_type == "LORA" else f" for {peft_type}")
    return UnsupportedError(fact, remedy=remedy)
