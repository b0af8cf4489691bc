"""What went to the Hub, or would go, as a person reads it: the address, each file, what stayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.cli._numbers import size
from loratools.cli._table import facts


def pushed(done: Mapping[str, Any], columns: int | None) -> list[str]:
    """The document of `push` as lines for so many columns."""
    would = "would push" if done["dry_run"] else "pushed"
    pairs = [(would, f"{done['url']}{', private' if done['private'] else ''}")]
    pairs += [("base" if place == 0 else "", base) for place, base in enumerate(done["base_models"])]
    pairs += [("licence", done["license"])]
    pairs += [("files" if place == 0 else "", f"{row['path']}, {size(row['bytes'])}") for place, row in enumerate(done["files"])]
    pairs += [("stays" if place == 0 else "", f"{row['path']}: {row['reason']}") for place, row in enumerate(done["left"])]
    return facts(pairs, columns)
