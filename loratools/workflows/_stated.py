"""The predicates of a target's rules that look at a file: the fields of its config, and its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loratools.workflows._subject import Hit, Subject


def config(
    subject: Subject, *, given: Sequence[str] = (), missing: Sequence[str] = (), like: Mapping[str, str] | None = None,
    takes: Mapping[str, Sequence[Any]] | None = None, strings: Mapping[str, Sequence[str]] | None = None, kinds: Sequence[str] = (),
    methods: Sequence[str] = (),
) -> Iterator[Hit]:  # fmt: skip
    """A field of the config that is given, or missing; entries of a pattern that repeat the field `like` names count for nothing.

    Of a field in `takes`, any other value than these and none; of one in `strings`, any other string. The hit concerns the deltas of
    `kinds`, else all. With `methods`, only of configs of these peft_types.
    """
    if subject.config is None or (methods and subject.config.get("peft_type", "LORA") not in methods):
        return
    concerned = tuple(dict.fromkeys(name for name, delta in subject.parts if delta.kind in kinds)) if kinds else subject.every
    for word in given:
        value = subject.config.get(word)
        if isinstance(value, Mapping) and like and word in like:
            value = {key: item for key, item in value.items() if item != subject.config.get(like[word])}
        if value:
            yield Hit(f"adapter_config.json: {word}", concerned, _short(value))
    for word in missing:
        if subject.config.get(word) is None:
            yield Hit(f"adapter_config.json: {word}", concerned, "missing")
    for word, known in (takes or {}).items():
        value = subject.config.get(word)
        if value is not None and (value.lower() if isinstance(value, str) else value) not in known:
            yield Hit(f"adapter_config.json: {word}", concerned, _short(value))
    for word, texts in (strings or {}).items():
        value = subject.config.get(word)
        if isinstance(value, str) and value not in texts:
            yield Hit(f"adapter_config.json: {word}", concerned, _short(value))


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, Mapping | list | tuple) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def keys(subject: Subject, *, never: str | None = None, always: str | None = None) -> Iterator[Hit]:
    """Keys of the file that a pattern finds, or that it does not find where it always should."""
    for key in subject.keys:
        if (never is not None and re.search(never, key)) or (always is not None and not re.search(always, key)):
            yield Hit(key, tuple(name for name in subject.adapter if name.rpartition(".")[0] and f"{name.rpartition('.')[0]}." in key))
