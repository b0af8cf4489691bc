"""Key tables of published adapters as containers: names and shapes, zeros for data, 1 for alphas."""

from __future__ import annotations

import json
from pathlib import Path

from loratools.formats.base import Container
from loratools.refs import InMemory, Spec

FOLDER = Path(__file__).parent.parent / "data" / "keys"
TABLES = {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def container(name: str) -> Container:
    """A recorded table as what a codec sees of a file."""
    table = json.loads(TABLES[name].read_text())
    return Container({key: InMemory(Spec("F32", tuple(shape)), _data(shape)) for key, shape in table.items()})


def _data(shape: list[int]) -> bytes:
    return bytes.fromhex("0000803f") if not shape else b""
