"""What check finds of an adapter, for every target."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools.errors import LoratoolsError
from loratools.formats.reading import Reading
from loratools.ops._base import Base
from loratools.workflows._checking import look
from loratools.workflows.targets import names


def findings(path: str | Path, on: Base | None, reading: Reading) -> list[dict[str, Any]]:
    """A row for each target: its findings and notes, or in `failed` why the adapter cannot be looked at for it."""
    return [_row(path, target, on, reading) for target in names()]


def _row(path: str | Path, target: str, on: Base | None, reading: Reading) -> dict[str, Any]:
    row: dict[str, Any] = {"target": target, "title": target, "findings": [], "failed": None}
    try:
        seen = look(path, target, on, dict(reading))
    except LoratoolsError as error:
        return row | {"failed": str(error)}
    found = [{word: value for word, value in asdict(one).items() if word not in ("target", "source")} for one in seen.findings]
    return row | {"title": seen.target.title, "findings": found}
