"""JSON objects in files: configs, indices, receipts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.errors import FormatError, SourceError
from loratools.source.handles import read_whole


def read_json(path: Path, *, once: bool = False) -> dict[str, Any]:
    """A JSON object from a file; FormatError naming it for anything else, and where it names something twice that it is to say `once`."""
    try:
        table = json.loads(read_whole(path).decode(), object_pairs_hook=_once if once else None)
    except SourceError:
        raise
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not readable as JSON: {error}", file=path) from None
    if not isinstance(table, dict):
        raise FormatError("not a JSON object", file=path)
    return table


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    names = [name for name, _ in pairs]
    if len(table) < len(names):
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
    return table


def write_json(path: Path, table: Mapping[str, Any], indent: int = 2) -> None:
    """A JSON object as UTF-8; half a surrogate pair, as in a file's name that is no Unicode, becomes JSON's own escape."""
    text = json.dumps(table, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The config with keys set, in the nested text config where that is where they stand; None removes, from nested ones too."""
    changed = json.loads(json.dumps(config))
    for key, value in values.items():
        if value is None:
            continue
        text = changed.get("text_config")
        place = text if isinstance(text, dict) and key in text and key not in changed else changed
        place[key] = value
    gone = [key for key, value in values.items() if value is None]
    for part in (changed, *(value for value in changed.values() if isinstance(value, dict))):
        for key in gone:
            part.pop(key, None)
    return dict(changed)
