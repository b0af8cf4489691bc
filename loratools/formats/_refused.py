"""What formats say alike of changes that they have no words for, and the ways out that they name."""

from __future__ import annotations

from pathlib import Path

from loratools.adapter import Adapter
from loratools.errors import LoratoolsError, NotExpressible

KEPT = "--format loratools keeps it"
BAKE, RESIZE = "rescale --bake makes it one", "resize --rank makes it one"


def passengers(adapter: Adapter, who: str) -> list[LoratoolsError]:
    """A fault for each tensor that is no change of a weight, in a format that has no place for such."""
    return [NotExpressible(f"{who} no place for it", tensor=name, remedy=KEPT) for name in adapter.passengers]


def nothing(file: Path | None = None, tensor: str | None = None) -> NotExpressible:
    """Of an adapter without a low-rank change."""
    remedy = f"convert it first: --kind lora; {KEPT}" if tensor is not None else "is it the right file?"
    return NotExpressible("no low-rank change to write", file=file, tensor=tensor, remedy=remedy)
