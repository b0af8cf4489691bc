"""Files that trainers write beside their weights: JSON, and YAML as far as they write it, read when asked for.

Of YAML only tables of plain values are read, nested by indentation as `yaml.dump` writes them; lists and everything else is passed over,
for all that is asked for is a few numbers and names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools.errors import FormatError
from loratools.jsonfile import read_json

_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w./-]+):(?:\s+(?P<value>.*?))?\s*")


class SideFiles(Mapping[str, Any]):
    """The tables beside a file, by name; `read` tells the paths of those that were looked at. Raises FormatError for what is none."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self._paths = {name: folder / name for name in names}
        self.read: dict[str, Path] = {}
        self._tables: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        path = self._paths[name]
        if name not in self._tables:
            if not path.is_file():
                raise KeyError(name)
            self._tables[name] = read_json(path) if path.suffix == ".json" else read_yaml(path)
            self.read[name] = path
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, path in self._paths.items() if path.is_file())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_yaml(path: Path) -> dict[str, Any]:
    """The tables of plain values in a YAML file. Raises FormatError for one that cannot be read as text."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"cannot be read ({type(error).__name__})", file=path) from None


def parse_yaml(text: str) -> dict[str, Any]:
    """The tables of plain values in YAML.

    >>> parse_yaml("lora_r: 8\\nmodel:\\n  name: 'a b'\\n  sizes:\\n  - 1\\n  bias: false\\n")
    {'lora_r': 8, 'model': {'name': 'a b', 'sizes': {}, 'bias': False}}
    """
    top: dict[str, Any] = {}
    open_: list[tuple[int, dict[str, Any]]] = [(-1, top)]
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        indent = len(found["indent"])
        while open_[-1][0] >= indent:
            open_.pop()
        value = _value(found["value"])
        open_[-1][1][found["key"]] = value
        if isinstance(value, dict):
            open_.append((indent, value))
    return top


def _value(text: str | None) -> Any:
    if text is None or text.startswith(("#", "!", "&")):
        return {}
    if text[:1] in "'\"" and text[-1:] == text[:1] and len(text) > 1:
        return text[1:-1]
    text = text.partition(" #")[0].rstrip()
    known: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "{}": {}}
    if text.lower() in known:
        return known[text.lower()]
    try:
        return json.loads(text) if re.fullmatch(r"-?\d+", text) else float(text) if re.match(r"[-+.\d]", text) else text
    except ValueError:
        return text


def write_yaml(path: Path, table: Mapping[str, Any]) -> None:
    """A table of plain values, and of tables of them, as YAML."""
    path.write_text("".join(_lines(table, "")), encoding="utf-8")


def _lines(table: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key}:\n"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, list):
            yield f"{indent}{key}:\n"
            yield from (f"{indent}- {json.dumps(item, ensure_ascii=False)}\n" for item in value)
        else:
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n"
