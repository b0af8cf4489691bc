"""A receipt beside what is published: which files are as it says, what it tells of this machine, and how it reads where files differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from loratools.sidefiles import file_entry
from loratools.weightfiles import is_index
from loratools.workflows._markdown import printable


def is_written(receipt: Mapping[str, Any] | None, file: Path) -> bool:
    """Whether a file of an output is as it was written, by the receipt's digest."""
    row = next((row for row in (receipt or {}).get("outputs", ()) if row.get("path") == file.name), None)
    return row is not None and row.get("blake3") == file_entry(file, file.name)["blake3"]


def places(receipt: Mapping[str, Any]) -> set[str]:
    """Absolute paths that a receipt tells."""
    said = [value for value in receipt.get("arguments", {}).values() if isinstance(value, str)]
    said += [str(row.get("path")) for row in receipt.get("inputs", ())]
    return {printable(text) for text in said if re.match(r"[/~]|[A-Za-z]:[/\\]", text)}


def receipt_of(receipt: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> bytes | None:
    """The receipt as it goes up, where it must tell of other files than lie here: rows of what changed anew, none of what stays."""
    rows, changed, stay = [], [], []
    for row in receipt.get("outputs", ()):
        there = files.get(str(row.get("path")))
        if there is None:
            stay.append(str(row.get("path")))
            continue
        if isinstance(there, Path) and row.get("header_sha256") is None and not is_index(there.name):
            there = there.read_bytes()
        if isinstance(there, bytes) and row.get("blake3") != blake3(there).hexdigest():
            row = row | {"bytes": len(there), "blake3": blake3(there).hexdigest()}
            row |= {"sha256": hashlib.sha256(there).hexdigest()} if "sha256" in row else {}
            changed.append(str(row["path"]))
        rows.append(row)
    if not changed and not stay:
        return None
    notes = [f"push: written anew: {', '.join(changed)}"] if changed else []
    notes += [f"push: not published: {', '.join(stay)}"] if stay else []
    told = {**receipt, "outputs": rows, "notes": [*(receipt.get("notes") or ()), *notes]}
    return (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
